"""What repeats becomes a function that is called, or a loop over weights.

Statements are compared by how they are written, whatever their operands; a stretch that occurs
several times with the same flow of values inside is a candidate, and the one that saves most text
is folded first. A function or loop is a statement like others, so that larger ones may hold it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

from .flow import MOST_SCOPES, Flow, Group, Place, Uses
from .program import Apply, Compute, Function, Loop, Program, Statement, Value
from .terms import Term
from .unfold import unfold
from .words import suggestion

LONGEST = 160
MOST_PARAMETERS, MOST_NUMBERS, MOST_TARGETS, MOST_RESULTS = MOST_SCOPES, 4, 3, 5
LEAST_GAIN, LEAST_BODY = 40, 90
ROUNDS = 3
"""Times that is folded what is left when functions that are not worth it have been written out."""
BEGINS = 30
"""What it is worth that a function begins with a layer, not with the end of the one before."""
TRIED = 600
"""Stretches that are looked at in full, those first that could save most."""

Slot: TypeAlias = "Value | Term"


def fold(program: Program, names: Sequence[str], inner_first: bool) -> None:
    """Fold what repeats, the best first, until nothing is worth it. `names` are the tensors'.

    `inner_first` folds what repeats inside the best before it: blocks of many layers are shared
    then, but layers may differ by it.
    """
    for _ in range(ROUNDS):
        before = len(program.body), [f.name for f in program.functions]
        folder = _Folder(program, list(names), inner_first)
        while folder.step():
            pass
        for function in list(program.functions):
            _fold_within(program, function, inner_first)
        unfold(program, _is_worth)
        if before == (len(program.body), [f.name for f in program.functions]):
            return


def _fold_within(program: Program, function: Function, inner_first: bool) -> None:
    """Fold what repeats in the body of a function; what comes of it stands before that."""
    inner = Program(function.body, function.results)
    folder = _Folder(inner, [], inner_first)
    folder.taken = {f.name for f in program.functions}
    while folder.step():
        pass
    function.body = inner.body
    at = program.functions.index(function)
    program.functions[at:at] = inner.functions


def _is_worth(function: Function, times: int) -> bool:
    """Whether so many calls of a function and the function itself are shorter than its body."""
    inner = sum(s.cost for s in function.body)
    count, results = len(function.params), len(function.results)
    return _saved(inner, times, count, results, function.body[0]) > LEAST_GAIN


def _saved(inner: int, times: int, count: int, results: int, first: Statement) -> int:
    """Characters that a function of `count` parameters saves, where `inner` are in its body."""
    call = 12 + 9 * count + 8 * (results - 1)
    begins = any(v.path is not None for v in first.reads)
    return inner * (times - 1) - times * call - 50 - 12 * count + BEGINS * begins


@dataclass
class _Found:
    """One way to fold: stretches of one length, and what it saves."""

    gain: int
    starts: list[int]
    length: int
    is_loop: bool

    def holds_twice(self, starts: list[int], length: int) -> bool:
        """Whether a shorter stretch occurs more than once in one of these."""
        begin, end = self.starts[0], self.starts[0] + self.length
        return sum(begin <= s and s + length <= end for s in starts) > 1


@dataclass
class _Turns:
    """What a loop goes over: the names that it sets, and in each turn's row what they are."""

    rows: list[list[Slot]]
    targets: list[Value] = field(default_factory=list)

    def add(self, target: Value, values: Sequence[Slot]) -> Value:
        """Another name, with what it is in each turn."""
        self.targets.append(target)
        for row, value in zip(self.rows, values, strict=True):
            row.append(value)
        return target


class _Folder:
    def __init__(self, program: Program, names: list[str], inner_first: bool) -> None:
        self.program, self.names, self.inner_first = program, names, inner_first
        self.taken: set[str] = set()
        self.children: dict[str, set[str]] = defaultdict(set)
        for name in names:
            parts = name.split(".")
            for n in range(1, len(parts)):
                self.children[".".join(parts[:n])].add(parts[n])

    def step(self) -> bool:
        """Fold the best candidate; whether there was one."""
        self.uses = Uses(self.program.body, self.program.results)
        candidates = self._candidates()
        best = self._best(candidates)
        while best is not None and self.inner_first:
            inner = self._best([c for c in candidates if best.holds_twice(c[1], c[2])])
            if inner is None:
                break
            best = inner  # what repeats inside is folded first
        if best is None:
            return False
        flow = Flow(self.uses, best.starts, best.length)
        if best.is_loop:
            self._loop(flow)
        else:
            self._function(flow)
        return True

    def _best(self, candidates: list[tuple[int, list[int], int]]) -> _Found | None:
        best: _Found | None = None
        for bound, starts, length in candidates:
            if best is not None and bound + BEGINS <= best.gain:
                break
            for is_loop, group in _groups(starts, length):
                gain = self._gain(group, length, is_loop)
                if gain > (best.gain if best is not None else LEAST_GAIN):
                    best = _Found(gain, group, length, is_loop)
        return best

    def _candidates(self) -> list[tuple[int, list[int], int]]:
        """Stretches that occur more than once: what folding them saves at most, and where."""
        body, cuts = self.uses.body, _cuts(self.uses)
        ends = set(cuts)
        codes: dict[object, int] = {}
        keys = [codes.setdefault(s.key, len(codes)) for s in body]
        totals = [0, *accumulate(s.cost for s in body)]
        after: dict[tuple[int, int], int] = {}  # one number for each different stretch
        seen: dict[int, list[int]] = defaultdict(list)
        lengths: dict[int, int] = {}
        for start in cuts:
            stretch = 0
            for end in range(start + 1, min(start + LONGEST, len(body)) + 1):
                stretch = after.setdefault((stretch, keys[end - 1]), len(after) + 1)
                if end in ends:
                    seen[stretch].append(start)
                    lengths[stretch] = end - start
        found = []
        for stretch, starts in seen.items():
            length = lengths[stretch]
            apart = _apart(starts, length)
            if len(apart) > 1:
                total = totals[starts[0] + length] - totals[starts[0]]
                found.append((total * (len(apart) - 1), apart, length))
        return sorted(found, key=lambda f: (-f[0], f[1], f[2]))[:TRIED]

    def _gain(self, starts: list[int], length: int, is_loop: bool) -> int:
        first = self.uses.body[starts[0] : starts[0] + length]
        inner = sum(s.cost for s in first)
        saved = inner * (len(starts) - 1)
        if not is_loop:
            applied = [s.function for s in first if isinstance(s, Apply)]
            part_of_loop = len(applied) != len(set(applied))
            if length < 2 or inner < LEAST_BODY or part_of_loop:
                return 0
        flow = Flow(self.uses, starts, length)
        groups = flow.scopes
        if groups is None:
            return 0
        if is_loop:
            if not flow.is_loop():
                return 0
            items = len(flow.varying_numbers()) + len(flow.loop_items())
            if items + len(groups) > MOST_TARGETS:
                return 0
            texts = sum(len(p) for _, bases in groups for p in bases)
            indexed = all(self._indexed(bases) is not None for _, bases in groups) and not items
            return saved - 30 - (20 if indexed else texts + 10 * items * len(starts))
        if len(flow.outs) > MOST_RESULTS or not flow.is_function():
            return 0
        varying = len(flow.varying_numbers())
        count = len(flow.parameters()) + len(groups) + varying
        if count > MOST_PARAMETERS or varying > MOST_NUMBERS:
            return 0
        return _saved(inner, len(starts), count, len(flow.outs), first[0])

    def _indexed(self, bases: Sequence[str]) -> tuple[str, int, bool] | None:
        """`a.b.0`, `a.b.1`: the scope above, the first number, whether those are all below it."""
        above = {b.rpartition(".")[0] for b in bases}
        last = [b.rpartition(".")[2] for b in bases]
        if len(above) != 1 or not all(n.isdigit() for n in last):
            return None
        numbers = [int(n) for n in last]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            return None
        (scope,) = above
        whole = self.children[scope] == {str(n) for n in numbers}
        return scope, numbers[0], whole

    # Folding

    def _function(self, flow: Flow) -> None:
        groups = flow.scopes or []
        inputs = flow.parameters()
        numbers = flow.varying_numbers()
        types = flow.types() or []
        given: dict[Place, Value] = {}
        params: list[Value] = []
        for slots, type in zip(inputs, types, strict=True):
            values = [flow.read(k, slots[0]) for k in range(len(flow.starts))]
            name = _shared_name(values) or (parameter_name(values[0]) if params else "x")
            params.append(Value(type, name))
            given.update(dict.fromkeys(slots, params[-1]))
        bases = []
        for members, paths in groups:
            is_tensor = flow.is_tensor(members, paths)
            own = flow.read(0, members[0]).type if is_tensor else None
            bases.append(Value(own, is_scope=not is_tensor))
        constants = [_constant(flow, slot) for slot in numbers]
        body = _copied(flow, groups, bases, dict(zip(numbers, constants, strict=True)), given)
        results = [body[t].gives[r] for t, r in flow.outs]
        name = self._name(groups)
        function = Function(name, [*params, *bases, *constants], body, results)
        self.program.functions.append(function)
        calls: dict[int, Statement] = {}
        for k, start in enumerate(flow.starts):
            reads = [flow.read(k, slots[0]) for slots in inputs]
            for (_, paths), base in zip(groups, bases, strict=True):
                reads.append(Value(base.type, path=paths[k], is_scope=base.is_scope))
            varying = [flow.number(k, slot) for slot in numbers]
            gives = [flow.body[start + t].gives[r] for t, r in flow.outs]
            calls[start] = Apply(function, reads, varying, gives)
        self._replace(flow, calls)

    def _loop(self, flow: Flow) -> None:
        groups = flow.scopes or []
        numbers, rest = flow.varying_numbers(), flow.loop_items()
        count = range(len(flow.starts))
        turns = _Turns([[] for _ in count])
        bases = None if numbers or rest else self._counted(groups, turns)
        if bases is None:
            bases = [_scope_of(flow, group, turns) for group in groups]
        given: dict[Place, Value] = {}
        for slots in rest:
            values = [flow.read(k, slots[0]) for k in count]
            name = _shared_name(values) or parameter_name(values[0])
            given.update(dict.fromkeys(slots, turns.add(Value(values[0].type, name), values)))
        constants = {
            slot: turns.add(_constant(flow, slot), [flow.number(k, slot) for k in count])
            for slot in numbers
        }
        carried = []
        for slots, out in flow.carried():
            begin = flow.read(0, slots[0])
            carried.append((begin, Value(begin.type), out, slots))
        given.update({s: inside for _, inside, _, slots in carried for s in slots})
        body = _copied(flow, groups, bases, constants, given)
        last = flow.starts[-1]
        leaves = [body[t].gives[r] for t, r in flow.outs]
        gives = [flow.body[last + t].gives[r] for t, r in flow.outs]
        outer = [flow.read(0, s) for s in flow.invariant()]
        loop = Loop(turns.targets, turns.rows,
                    [(b, i, body[o[0]].gives[o[1]]) for b, i, o, _ in carried],
                    body, leaves, gives, outer)  # fmt: skip
        self._replace(flow, {flow.starts[0]: loop})

    def _counted(self, groups: list[Group], turns: _Turns) -> list[Value] | None:
        """The scopes of a loop over numbers, `w.layers[i]`; None if they are not numbered alike. Of
        a single one whose numbers are all used, the loop is over what it holds."""
        indexed = [self._indexed(paths) for _, paths in groups]
        found = [i for i in indexed if i is not None]
        firsts = {first for _, first, _ in found}
        if len(found) != len(indexed) or len(firsts) != 1:
            return None
        if len(found) == 1 and found[0][2]:
            return None
        (first,) = firsts
        numbers = [Value(name=str(first + k)) for k in range(len(turns.rows))]
        index = turns.add(Value(None, "i", name="index"), numbers)
        return [Value(path=scope, base=index, is_scope=True) for scope, _, _ in found]

    def _replace(self, flow: Flow, new: dict[int, Statement]) -> None:
        gone = {s + t for s in flow.starts for t in range(flow.length)}
        body: list[Statement] = []
        for n, statement in enumerate(flow.body):
            if n in new:
                body.append(new[n])
            elif n not in gone:
                body.append(statement)
        self.program.body = body

    def _name(self, groups: list[Group]) -> str:
        numbered = len(groups) == 1 and all(p.split(".")[-1].isdigit() for p in groups[0][1])
        word = _word(groups[0][1][0]) if numbered else "block"
        taken = self.taken | {f.name for f in self.program.functions}
        name, number = word, 2
        while name in taken:
            name, number = f"{word}{number}", number + 1
        return name


def _scope_of(flow: Flow, group: Group, turns: _Turns) -> Value:
    """What a loop calls the scope, or the tensor, that it goes over."""
    members, paths = group
    is_tensor = flow.is_tensor(members, paths)
    base = Value(flow.read(0, members[0]).type if is_tensor else None, is_scope=not is_tensor)
    base.hint = _word(paths[0])
    return turns.add(base, [Value(base.type, path=p, is_scope=not is_tensor) for p in paths])


def _word(path: str) -> str:
    """A word for what a scope holds: `encoder.layer.3` is a layer, `blocks.1` a block."""
    parts = [p.rstrip("0123456789_") for p in path.split(".")]
    words = [p for p in parts if p]
    word = words[-1].lower() if words and len(words[-1]) > 1 else "layer"
    word = "".join(c if c.isalnum() else "_" for c in word).strip("_") or "block"
    return word[:-1] if word.endswith("s") and len(word) > 3 and word[-2] != "s" else word


def _constant(flow: Flow, slot: Place) -> Value:
    """A parameter for a number that differs."""
    number = flow.number(0, slot)
    if isinstance(number, Term):
        is_int = all(isinstance(n, Term) and _is_int(n) for n in flow.numbers(slot))
        return Value(None, _number_hint(flow, slot), name="number", path="int" if is_int else "")
    return Value(None, number.hint, name="number", path=number.path)


def _is_int(term: Term) -> bool:
    return _is_int(term.args[0]) if term.kind == "unary" else term.value[0] == "int"


def _number_hint(flow: Flow, slot: Place) -> str:
    """What a number is: the keyword that it is given by."""
    statement = flow.body[flow.starts[0] + slot[0]]
    number = flow.number(0, slot)
    if isinstance(statement, Compute) and statement.term.kind == "call":
        names = statement.term.value[1]
        at = len(statement.term.args) - len(names)
        for name, arg in zip(names, statement.term.args[at:], strict=True):
            if arg is number:
                return str(name)
    if isinstance(statement, Apply):
        params = statement.function.params
        return params[len(statement.reads) + slot[1]].hint
    return "a"


def _groups(starts: list[int], length: int) -> Iterator[tuple[bool, list[int]]]:
    """All occurrences, as calls of a function; each run of neighbours, as turns of a loop."""
    yield False, starts
    run = [starts[0]]
    for start in [*starts[1:], -1]:
        if start == run[-1] + length:
            run.append(start)
        else:
            if len(run) > 1:
                yield True, run
            run = [start]


def _apart(starts: Sequence[int], length: int) -> list[int]:
    kept: list[int] = []
    for start in starts:
        if not kept or start >= kept[-1] + length:
            kept.append(start)
    return kept


def _cuts(uses: Uses) -> list[int]:
    """Places where fewer values pass than around them, in order."""
    count = len(uses.body)
    change = [0] * (count + 2)
    for value, (start, _) in uses.made.items():
        change[start + 1] += 1
        change[max(uses.last(value), start) + 1] -= 1
    live = list(accumulate(change[: count + 1]))
    inner = range(1, count)
    return [0, *(n for n in inner if live[n - 1] >= live[n] <= live[n + 1]), count]


def _shared_name(values: Sequence[Value]) -> str:
    """What inputs are called that differ in a number: `past_0_key`, `past_1_key`."""
    names = {re.sub(r"_?[0-9]+(?=_|$)", "", v.name) for v in values}
    return names.pop() if len(names) == 1 else ""


def parameter_name(value: Value) -> str:
    """A name for a tensor that is handed over: an input's without its number, or of what it is."""
    if value.maker is None:
        return value.name.rstrip("0123456789_") or "x"
    found = suggestion(value)
    return "y" if found == "x" else found


def _copied(
    flow: Flow, groups: list[Group], bases: list[Value], numbers: dict[Place, Value],
    given: dict[Place, Value],
) -> list[Statement]:
    """The first occurrence as a body of its own: `given` are parameters by the slots that read
    them, to which paths below the bases are added."""
    for (members, paths), base in zip(groups, bases, strict=True):
        for slot in members:
            value = flow.read(0, slot)
            rest = (value.path or "")[len(paths[0]) :].lstrip(".")
            if base.path is None and not rest:
                given[slot] = base
            elif base.path is not None:  # below a number: `w.layers[i].rest`
                path = f"{base.path}.?" + (f".{rest}" if rest else "")
                given[slot] = Value(value.type, path=path, base=base.base, is_scope=value.is_scope)
            else:
                given[slot] = Value(value.type, path=rest, base=base, is_scope=value.is_scope)
    copies: dict[Value, Value] = {}
    made: list[Statement] = []
    for t in range(flow.length):
        statement = flow.body[flow.starts[0] + t]
        reads = [given.get((t, j)) or copies.get(v, v) for j, v in enumerate(statement.reads)]
        gives = [Value(v.type, v.hint) for v in statement.gives]
        copies.update(zip(statement.gives, gives, strict=True))
        if isinstance(statement, Compute | Apply):
            own = [numbers.get((t, j), n) for j, n in enumerate(statement.numbers)]
            if isinstance(statement, Compute):
                made.append(Compute(statement.term, reads, own, gives))
            else:
                made.append(Apply(statement.function, reads, own, gives))
    return made
