"""One instruction of each form and each choice of its words, built from the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from stagefuse.compiler.ptx import Kernel, ModuleBuilder, PtxError
from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.table import Form, Match, OperandSpec
from stagefuse.compiler.ptx.types import TYPES

SPACES = {"shared::cta": "shared", "shared::cluster": "shared", "param::entry": "param"}


@dataclass(frozen=True)
class Sample:
    """A form, the instruction's name, and the optional words it has."""

    form: Form
    match: Match

    @property
    def name(self) -> str:
        return ".".join((self.form.opcode, *words(self.form, self.match)))


def words(form: Form, match: Match) -> tuple[str, ...]:
    return tuple(match.slots[slot.name] for slot in form.slots if slot.name in match.slots)


def samples(form: Form) -> Iterator[Sample]:
    """Every type with no option, then each option alone, then all options."""
    needed = {slot.name: slot.words for slot in form.slots if not slot.optional}
    first = {name: words[0] for name, words in needed.items()}
    seen = {tuple({**first, name: word}.items()) for name in needed for word in needed[name]}
    types = [name for name in needed if name in form.choices]
    for combination in product(*(needed[name] for name in types)):
        seen.add(tuple({**first, **dict(zip(types, combination, strict=True))}.items()))
    seen = seen or {()}
    for mine_items in sorted(seen):
        yield Sample(form, Match(form, dict(mine_items)))
    base = dict(min(seen))
    for slot in form.slots:
        if slot.optional:
            for word in slot.words:
                yield Sample(form, Match(form, {**base, slot.name: word}))


def emit(k: Kernel, sample: Sample) -> None:
    """Adds the sample with operands of the types that its form says."""
    match = sample.match
    sources: list[object] = []
    into: object = None
    for spec in match.form.specs:
        if spec.is_result:
            if spec.type == "any":
                into = _parts(k, match)
            continue
        if spec.optional and spec.name != "h":
            continue
        if spec.name == "h" and "hint" not in match:
            continue
        sources.append(_source(k, match, spec))
    k.op(sample.name, *sources, into=into, pair=any(x.paired for x in match.form.specs))  # type: ignore[arg-type]


def _parts(k: Kernel, match: Match) -> list[object]:
    bits = TYPES[match.get("T")].bits
    if bits == 16:
        raise PtxError("no registers of 8 bits")
    return [k.reg(f"b{bits // 2}") for _ in range(2)]


def _source(k: Kernel, match: Match, spec: OperandSpec) -> object:
    if spec.kind == "address":
        space = spec.space or match.get("space") or match.get("S", "global")
        space = SPACES.get(space, space)
        if space == "tensor":
            coordinates = tuple(k.reg("s32").register for _ in range(int(match.get("dim")[0])))
            return s.Address(k.param("p").register, 0, coordinates)
        if space in ("shared", "local"):
            name = f"{space}_x"
            made = s.Symbol(f"{k.name}_{name}")
            if all(v.name != made.name for v in k._variables):
                k.shared(name, "b8", 1024, 128) if space == "shared" else k.local(name, "b8", 1024)
            return made
        if space.startswith("param"):
            return k.param_address("x")
        if space == "const":
            return s.Symbol("c")
        return k.param("p")
    if spec.kind == "constant":
        if match.form.opcode == "setmaxnreg":
            return 40
        if spec.name == "size":
            return 16 if match.form.opcode == "cp" else 128
        return {"scale": -1, "trans": 1, "mode": 1, "selec": 0}.get(spec.name[:5], 4)
    if spec.kind == "predicate":
        return ~k.reg("pred")
    if spec.type == "any":
        return _parts(k, match)
    kind = match.type_of(spec)
    if kind == "pred":
        return k.reg("pred")
    kind = f"b{max(16, TYPES[kind].bits)}" if TYPES[kind].bits < 16 else kind
    count = match.count_of(spec)
    return [k.reg(kind) for _ in range(count)] if count else k.reg(kind)


def module(target: str) -> ModuleBuilder:
    b = ModuleBuilder(target, (8, 8))
    b.variable("c", "b8", 1024, space="const", align=128)
    return b
