"""Recurrences over a known number of steps, which `for` unrolls.

Source: the definitions of RNN, GRU and LSTM in the ONNX operator reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagefuse.dsl.dims import Expr

from ..errors import Refused
from ..node import Node, Val
from ..record import Written, op
from ..text import size_text

MAX_STEPS = 512
ACTIVATIONS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


@dataclass
class Layer:
    """One direction: the sums of the input for all steps, its weights, its first state."""

    n: Node
    index: int
    backward: bool
    steps: int
    batch: Expr
    hidden: int

    def part(self, number: int, rank: int) -> str:
        """This direction's part of an input."""
        colons = ", ".join([":"] * (rank - 1))
        return f"{self.n.bound(self.n.val(number), 'c')}[{self.index}, {colons}]"

    def start(self, number: int, name: str) -> str:
        """The first state: given, or zeros."""
        fresh = self.n.fresh(name)
        dtype = self.n.val(0).dtype
        text = f"zeros([{size_text(self.batch)}, {self.hidden}], {dtype})"
        if self.n.maybe(number) is not None:
            text = self.part(number, 3)
            if self.n.attr("layout", 0):
                text = f"{self.n.bound(self.n.val(number), 'c')}[:, {self.index}, :]"
        self.n.body.add(f"{fresh} = {text}")
        return fresh


@op("RNN", "GRU", "LSTM", unread=["activation_alpha", "activation_beta"])
def _recurrent(n: Node) -> Written:
    _require_plain(n)
    by_batch = bool(n.attr("layout", 0))
    x = n.let("steps", f"transpose({n.x(0)}, [1, 0, 2])").text if by_batch else n.bound(n.val(0))
    time, batch = n.val(0).shape[1 if by_batch else 0], n.val(0).shape[0 if by_batch else 1]
    steps = time.as_int()
    if steps is None or not 1 <= steps <= MAX_STEPS:
        raise Refused(f"{time} steps", f"a number known while importing, at most {MAX_STEPS}; "
                      "`sizes` gives a size one value")  # fmt: skip
    _require_whole(n, steps)
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    kind = n.one_of("direction", "forward", *directions)
    found = [
        _layer(Layer(n, index, backward, steps, batch, n.attr("hidden_size")), x)
        for index, backward in enumerate(directions[kind])
    ]
    axis = 2 if by_batch else 1
    order = "[1, 0, 2]" if by_batch else ""
    rows = [f"transpose({y}, {order})" if order else y for y, *_ in found]
    results: list[str | Val] = [n.let(n.hint, f"stack([{', '.join(rows)}], axis={axis})")]
    for k in range(1, len(found[0])):
        last = ", ".join(states[k] for states in found)
        results.append(f"stack([{last}], axis={1 if by_batch else 0})")
    return results


def _require_plain(n: Node) -> None:
    if n.attr("clip"):
        raise Refused("states that are clipped", "plain states", "clip")
    if n.attr("input_forget", 0):
        raise Refused("coupled gates", "gates of their own", "input_forget")
    given = n.attr("activations")
    if given and [a.lower() for a in given] != [
        a.lower() for a in ACTIVATIONS[n.op] * (len(given) // len(ACTIVATIONS[n.op]))
    ]:
        raise Refused(f"the activations {given}", f"{ACTIVATIONS[n.op]}", "activations")


def _require_whole(n: Node, steps: int) -> None:
    if n.maybe(4) is None:
        return
    if any(length != steps for length in n.ints(4, "sequence_lens")):
        raise Refused("sequences of different lengths", "all of one length")


def _layer(layer: Layer, x: str) -> list[str]:
    """The states of all steps and the last ones, in lines; names of them."""
    n, hidden = layer.n, layer.hidden
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[n.op] * hidden
    whole = f"{x} @ transpose({layer.part(1, 3)})"
    bias = ""
    if n.maybe(3) is not None:
        bias = n.let("bias", layer.part(3, 2)).text
        whole = f"{whole} + {bias}[:{gates}]"
        if n.op == "LSTM":
            whole = f"{whole} + {bias}[{gates}:]"
    inputs = n.let("gates", whole).text
    r = n.let("r_", layer.part(2, 3)).text
    after = f"{bias}[{gates}:]" if bias else f"zeros([{gates}], {n.val(0).dtype})"
    h = layer.start(5, "h")
    states = [h]
    step = f"{inputs}[{f'{layer.steps - 1} - t' if layer.backward else 't'}]"
    if n.op == "RNN":
        call = f"onnx.rnn_step({step}, {h}, {r}, {after})"
    elif n.op == "GRU":
        reset = ", reset_after=True" if n.attr("linear_before_reset", 0) else ""
        call = f"onnx.gru_step({step}, {h}, {r}, {after}{reset})"
    else:
        states.append(layer.start(6, "cell"))
        peephole = n.maybe(7) is not None
        more = f", {n.let('p', layer.part(7, 2)).text}" if peephole else ""
        name = "peephole_lstm_step" if peephole else "lstm_step"
        call = f"onnx.{name}({step}, {', '.join(states)}, {r}{more})"
    return [_loop(n, layer, states, call), *states]


def _loop(n: Node, layer: Layer, states: list[str], call: str) -> str:
    """The unrolled loop, which collects the states of all steps."""
    rows = n.fresh("rows")
    h = f"{states[0]}[None, :, :]"
    order = f"[{h}, {rows}]" if layer.backward else f"[{rows}, {h}]"
    shape = f"[0, {size_text(layer.batch)}, {layer.hidden}]"
    n.body.add(f"{rows} = zeros({shape}, {n.val(0).dtype})")
    n.body.add(f"for t in 0..{layer.steps}:\n    {', '.join(states)} = {call}\n"
               f"    {rows} = concat({order}, axis=0)")  # fmt: skip
    return rows
