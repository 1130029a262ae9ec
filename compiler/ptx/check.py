"""Whether an instruction is legal: which form it is, its operands, its target.

What is checked of a form, numbered as in error messages' order:

1. the opcode and modifiers are a row of the table,
2. operands are as many, and of the kinds, that the row says,
3. types of registers agree with the row's types (PTX ISA, "Operand Type Checking"),
4. the module's PTX version and target have the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from . import syntax as s
from .errors import PtxError
from .printer import print_instruction, print_operand
from .table import Form, Match, OperandSpec, matches
from .types import TYPES, agrees

Bound = tuple[tuple[OperandSpec, s.Operand | None], ...]
"""The operands of a form in its order, `None` for one that is left out."""


def bind(instruction: s.Instruction) -> tuple[Match, Bound]:
    """The form that an instruction is, and its operands by the form's specs.

    Raises: PtxError that names the instruction, and what each form that it could be misses.
    """
    key = instruction.opcode, instruction.modifiers, kinds(instruction.operands)
    known = _BOUND.get(key)
    if known is not None:
        match, present = known
        rest = iter(instruction.operands)
        return match, tuple([
            (spec, next(rest) if here else None)
            for spec, here in zip(match.form.specs, present, strict=True)
        ])  # fmt: skip
    reasons: list[str] = []
    for match, bound in _fitting(instruction, reasons):
        if len(_BOUND) > _MOST_BOUND:
            _BOUND.clear()
        _BOUND[key] = match, tuple(operand is not None for _, operand in bound)
        return match, bound
    text = "; ".join(dict.fromkeys(reasons))
    raise PtxError(f"`{print_instruction(instruction)}`: {text}", line=instruction.line)


Kind = Any
"""All of an operand that decides which form an instruction is: its class, types of registers."""
_BOUND: dict[tuple[str, tuple[str, ...], tuple[Kind, ...]], tuple[Match, tuple[bool, ...]]] = {}
"""What instructions were found to be: the form, and which of its operands are there."""
_MOST_BOUND = 1 << 14


def kinds(operands: Iterable[s.Operand]) -> tuple[Kind, ...]:
    """The kinds of operands: instructions that agree in these and their names are of one form."""
    return tuple([x.type if x.__class__ is s.Register else _kind(x) for x in operands])


def _kind(x: s.Operand) -> Kind:
    match x:
        case s.Special(name):
            return s.Special, "cluster" in name
        case s.FloatImmediate(_, width):
            return s.FloatImmediate, width
        case s.Vector(elements):
            return s.Vector, kinds(elements)
        case s.Pair(first, second):
            return s.Pair, kinds((first, second))
        case s.Address(base, _, coordinates):
            return s.Address, kinds((base, *coordinates))
        case _:
            return x.type if isinstance(x, s.Register) else x.__class__


def _fitting(instruction: s.Instruction, reasons: list[str]) -> Iterator[tuple[Match, Bound]]:
    """Each form that an instruction can be; `reasons` gets why it is no other."""
    try:
        candidates = matches(instruction.opcode, instruction.modifiers)
    except PtxError as error:
        raise PtxError(error.message, line=instruction.line) from None
    for match in candidates:
        bound = _assign(match, instruction.operands)
        if bound is None:
            reasons.append(f"`{match.form.pattern()}` takes {match.form.operands or 'nothing'}")
            continue
        wrong = _mistyped(match, bound)
        if wrong is None:
            yield match, bound
        else:
            reasons.append(wrong)


def check(instruction: s.Instruction, version: tuple[int, int], target: str) -> Match:
    """The form of an instruction that is legal for a PTX version and a target.

    Raises: PtxError that says what is wrong, and what would be needed.
    """
    match, _ = bind(instruction)
    why = unmet(instruction, match.form, version, target)
    if not why:
        return match
    for other, _ in _fitting(instruction, []):
        if not unmet(instruction, other.form, version, target):
            return other
    raise PtxError(f"`{instruction.name}` {why}", line=instruction.line)


def unmet(
    instruction: s.Instruction, form: Form, version: tuple[int, int], target: str
) -> str:  # fmt: skip
    """What an instruction needs that a PTX version or a target does not have, "" for nothing."""
    number, feature = target_number(target)
    if form.arch and form.arch != f"{number}{feature}":
        return f"needs exactly sm_{form.arch}, and the target is {target}"
    clusters = any(isinstance(x, s.Special) and "cluster" in x.name for x in instruction.operands)
    return _older(form, version, target) or (_older(_CLUSTERS, version, target) if clusters else "")


def check_function(function: s.Function, version: tuple[int, int], target: str) -> None:
    """Raises: PtxError for a directive of clusters where the target or PTX version has none."""
    for name, _ in function.directives:
        if "cluster" in name and (why := _older(_CLUSTERS, version, target)):
            raise PtxError(f"`.{name}` {why}", line=function.line)


_CLUSTERS = Form("mapa", "", "", "", "", version=(7, 8), target=90)
"""What all that speaks of clusters needs."""


def _older(needed: Form, version: tuple[int, int], target: str) -> str:
    """What of a form's PTX version and target is newer than these."""
    if needed.target > target_number(target)[0]:
        return f"needs sm_{needed.target}, and the target is {target}"
    if needed.version > version:
        needs, have = (".".join(map(str, v)) for v in (needed.version, version))
        return f"needs PTX {needs}, and the module says {have}"
    return ""


@lru_cache
def target_number(target: str) -> tuple[int, str]:
    """`sm_90a` is 90 and `a`."""
    found = re.fullmatch(r"sm_(\d+)([af]?)", target)
    if found is None:
        raise PtxError(f"`{target}` is no target")
    return int(found[1]), found[2]


def _assign(match: Match, operands: tuple[s.Operand, ...]) -> Bound | None:
    """Operands by specs, where optional ones may be missing; `None` where they do not fit."""
    rest = list(operands)
    bound: list[tuple[OperandSpec, s.Operand | None]] = []
    for at, spec in enumerate(match.form.specs):
        still = sum(is_needed(match, later) for later in match.form.specs[at + 1 :])
        takes = bool(rest) and (not spec.optional or len(rest) > still) and _is_kind(spec, rest[0])
        if spec.name == "h" and spec.optional:
            takes = takes and "hint" in match
        if takes:
            bound.append((spec, rest.pop(0)))
        elif spec.optional:
            bound.append((spec, None))
        else:
            return None
    return tuple(bound) if not rest else None


def is_needed(match: Match, spec: OperandSpec) -> bool:
    """Whether an operand must be there; a cache policy must where the instruction says so."""
    return not spec.optional or spec.name == "h" and "hint" in match


def _is_kind(spec: OperandSpec, x: s.Operand) -> bool:
    if isinstance(x, s.Pair):
        return spec.paired and _is_kind(spec, x.first)
    match spec.kind:
        case "address":
            return isinstance(x, s.Address) and bool(x.coordinates) == (spec.space == "tensor")
        case "label":
            return isinstance(x, s.Symbol | s.Register)
        case "arguments":
            return isinstance(x, s.Arguments)
        case "constant":
            return isinstance(x, s.Immediate)
        case "predicate":
            return isinstance(x, s.Register | s.Negated | s.Immediate)
    if isinstance(x, s.Vector):
        return bool(spec.count)
    if isinstance(x, s.Sink) or spec.name == "_":
        return isinstance(x, s.Sink) and spec.is_result
    if isinstance(x, s.Negated):
        return not spec.is_result
    return isinstance(x, s.Register | s.Special | s.Immediate | s.FloatImmediate | s.Symbol)


def _mistyped(match: Match, bound: Bound) -> str | None:
    """What is wrong with the types of operands, or `None`."""
    for spec, x in bound:
        if x is None or spec.kind in ("label", "arguments"):
            continue
        if isinstance(x, s.Pair):
            if not (isinstance(x.second, s.Sink) or _fits(x.second, "pred", False)):
                return f"{print_operand(x.second)} is no predicate"
            x = x.first
        if isinstance(x, s.Address):
            wrong = _address(x, match.get("space")) or _coordinates(x, match.get("dim"))
        elif spec.kind == "constant":
            wrong = None
        else:
            wrong = _values(match, spec, x)
        if wrong is not None:
            return wrong
    return None


def _address(x: s.Address, space: str) -> str | None:
    if isinstance(x.base, s.Immediate) and space != "local":
        return "an address is a number in local memory alone"
    if isinstance(x.base, s.Register) and x.base.type not in ADDRESS_TYPES:
        return f"{x.base.name} is a {x.base.type}, and an address has 32 or 64 bits"
    return None


def _coordinates(x: s.Address, dim: str) -> str | None:
    if x.coordinates and len(x.coordinates) != int(dim[0]):
        return f"{len(x.coordinates)} coordinates of a {dim} tensor"
    if not all(_fits(c, "s32", False) for c in x.coordinates):
        return "a coordinate is an s32"
    return None


ADDRESS_TYPES = ("b32", "u32", "s32", "b64", "u64", "s64")


def _values(match: Match, spec: OperandSpec, x: s.Operand) -> str | None:
    count = match.count_of(spec) if spec.count != "N" or "N" in match else -1
    elements = x.elements if isinstance(x, s.Vector) else (x,)
    braces = isinstance(x, s.Vector)
    if count == -1:
        return None if braces and _joins(match, elements) else "the elements do not add up"
    if count > 0 and (not braces or len(elements) != count):
        if not (count == 1 and not braces):
            return f"{spec.name} has {count} values in braces"
    if count == 0 and braces and len(elements) != 1:
        return f"{spec.name} is one value, without braces"
    kind = "pred" if spec.kind == "predicate" else match.type_of(spec)
    for element in elements:
        if not _fits(element, kind, spec.loose):
            shown = element.type if isinstance(element, s.Register) else "another kind"
            return f"{print_operand(element)} is {shown}, and {spec.name} is {kind}"
    return None


def _joins(match: Match, elements: tuple[s.Operand, ...]) -> bool:
    """Whether elements are as large together as the type T."""
    bits = [TYPES[e.type].bits for e in elements if isinstance(e, s.Register)]
    each = TYPES[match.get("T")].bits // len(elements)
    return len(elements) in (2, 4) and all(b == each for b in bits)


def _fits(x: s.Operand, want: str, loose: bool) -> bool:
    match x:
        case s.Register(_, have):
            return agrees(have, want) or loose and _widens(have, want)
        case s.Negated():
            return want == "pred"
        case s.Immediate():
            return TYPES[want].kind != "float" or TYPES[want].bits == 16
        case s.FloatImmediate(_, width):
            return want in ("f32", "f64") or want == f"b{width}"
        case s.Special():
            return TYPES[want].bits >= 16 or want == "pred"
        case s.Symbol():
            return TYPES[want].bits >= 32
        case _:
            return isinstance(x, s.Sink)


def _widens(have: str, want: str) -> bool:
    """Relaxed checking of ld, st and cvt: a wider register, integer or of bits."""
    a, b = TYPES[have], TYPES[want]
    if a.kind == "pred" or b.kind == "pred" or a.bits < b.bits:
        return False
    return a.kind == "bits" or "float" not in (a.kind, b.kind)
