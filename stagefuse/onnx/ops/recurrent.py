"""Recurrent layers: functions of the library over `scan`.

Source: the definitions of RNN, GRU and LSTM in the ONNX operator reference.
"""

from __future__ import annotations

from stagefuse.dsl.dims import Expr
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import literal, size_text

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
USUAL = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
"""The activations of one direction where the model names none."""
DEFAULTS: dict[str, tuple[float | None, float | None]] = {
    "sigmoid": (None, None), "tanh": (None, None), "relu": (None, None),
    "softsign": (None, None), "softplus": (None, None), "leakyrelu": (0.01, None),
    "thresholdedrelu": (1.0, None), "elu": (1.0, None), "hardsigmoid": (0.2, 0.5),
    "affine": (1.0, 0.0), "scaledtanh": (1.0, 1.0),
}  # fmt: skip
"""alpha and beta of the activations, None where there is none."""
BACKWARD = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}


@op("RNN", "GRU", "LSTM")
def recurrent(n: Node) -> Written:
    """The layers' results; inputs as the standard has them."""
    by_batch = bool(n.attr("layout", 0))
    x = n.let("steps", f"transpose({n.x(0)}, [1, 0, 2])").text if by_batch else n.bound(n.val(0))
    shape = n.val(0).shape
    batch, steps = (shape[0], shape[1]) if by_batch else (shape[1], shape[0])
    backward = BACKWARD[n.one_of("direction", "forward", *BACKWARD)]
    activations, options = _activations(n, len(backward)), _options(n, steps)
    found = [
        _direction(n, index, x, batch, {**activations[index], **options}, reverse)
        for index, reverse in enumerate(backward)
    ]
    rows = [f"transpose({y}, [1, 0, 2])" if by_batch else y for y, *_ in found]
    results: list[str | Val] = [n.let(n.hint, _joined(rows, 2 if by_batch else 1))]
    for states in list(zip(*found, strict=True))[1:]:
        results.append(_joined(states, 1 if by_batch else 0))
    return results


def _joined(parts: list[str] | tuple[str, ...], axis: int) -> str:
    return f"stack([{', '.join(parts)}], axis={axis})"


def _options(n: Node, steps: Expr) -> dict[str, str]:
    """Arguments that all directions share."""
    found: dict[str, str] = {}
    lengths = n.maybe(4)
    if lengths is not None:
        known = None if lengths.known is None else {int(v) for v in lengths.known.reshape(-1)}
        if known != {steps.as_int()}:
            found["lengths"] = n.bound(lengths) if lengths.dtype.bits == 64 else f"i64({n.x(4)})"
    if n.attr("clip"):
        found["clip"] = literal(float(n.attr("clip")))
    if n.op == "GRU" and n.attr("linear_before_reset", 0):
        found["reset_after"] = "True"
    if n.op == "LSTM" and n.attr("input_forget", 0):
        found["coupled"] = "True"
    return found


def _activations(n: Node, directions: int) -> list[dict[str, str]]:
    """For each direction the arguments that name its activations, where they are not the usual.

    alpha and beta are given in order, to the activations that have any. Raises Refused.
    """
    usual = USUAL[n.op] * directions
    names = [a.lower() for a in n.attr("activations") or usual]
    if n.op == "RNN":
        names = names[:directions]  # the schema's default has one for each of two directions
    alphas, betas = list(n.attr("activation_alpha") or ()), list(n.attr("activation_beta") or ())
    if len(names) != len(usual) or not DEFAULTS.keys() >= set(names):
        raise Refused(f"the activations {names}", f"{len(usual)} of {', '.join(DEFAULTS)}",
                      "activations")  # fmt: skip
    found: list[dict[str, str]] = [{} for _ in range(directions)]
    each = len(USUAL[n.op])
    for number, name in enumerate(names):
        place, letter = found[number // each], "fgk"[number % each]
        if name != usual[number].lower():
            place[letter] = f'"{name}"'
        for what, given, default in zip(("alpha", "beta"), (alphas, betas), DEFAULTS[name],
                                        strict=True):  # fmt: skip
            if default is not None:
                value = given.pop(0) if given else default
                place[f"{letter}_{what}"] = literal(float(value))
    return found


def _direction(
    n: Node, index: int, x: str, batch: Expr, options: dict[str, str], reverse: bool
) -> list[str]:
    """One direction in lines: names of the states of all steps and of the last ones."""

    def part(number: int, rank: int) -> str:
        colons = ", ".join([":"] * (rank - 1))
        return f"{n.bound(n.val(number), 'c')}[{index}, {colons}]"

    def start(number: int, hint: str) -> str:
        if n.maybe(number) is None:
            shape = f"[{size_text(batch)}, {n.attr('hidden_size')}]"
            return n.let(hint, f"zeros({shape}, {n.val(0).dtype})").text
        axes = f":, {index}, :" if n.attr("layout", 0) else f"{index}, :, :"
        return f"{n.bound(n.val(number), 'c')}[{axes}]"

    size = GATES[n.op] * int(n.attr("hidden_size"))
    gates = f"{x} @ transpose({part(1, 3)})"
    bias = f"zeros([{size}], {n.val(0).dtype})"
    if n.maybe(3) is not None:
        whole = n.let("bias", part(3, 2)).text
        bias = f"{whole}[{size}:]"
        gates += f" + {whole}[:{size}]" + ("" if n.op == "GRU" else f" + {bias}")
    arguments = [n.let("gates", gates).text, part(2, 3)]
    if n.op == "GRU":
        arguments.append(bias)
    arguments.append(start(5, "h"))
    hints = ["y", "h"]
    if n.op == "LSTM":
        arguments.append(start(6, "c"))
        hints.append("c")
        if n.maybe(7) is not None:
            arguments.append(f"peepholes={part(7, 2)}")
    if reverse:
        options = {**options, "reverse": "True"}
    arguments += [f"{name}={value}" for name, value in options.items()]
    call = f"onnx.{n.op.lower()}({', '.join(arguments)})"
    return [v.text for v in n.many(hints, call)]
