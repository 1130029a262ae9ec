"""Registers whose values nobody looks at: they are only put into words in memory, or never used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from stagefuse.compiler.ptx import bind
from stagefuse.compiler.ptx import syntax as s

if TYPE_CHECKING:
    from .program import Code, Step

PACKING = frozenset(("mov", "and", "or", "xor", "not", "shl", "shr", "bfi", "prmt", "lop3"))
"""Instructions that move bits and look at none of them."""


def only_repacked(code: Code, registers: Iterable[s.Operand]) -> bool:
    """Whether registers are at most stored, or put into words that are.

    Compilers that do not optimise copy structs member by member and set bit-fields in words that
    nothing wrote: they read a word, put bits into it and store it. What it had does not matter.
    """
    if code.looked_at is None:
        code.looked_at = _find(code)
    return all(not isinstance(x, s.Register) or x.name not in code.looked_at for x in registers)


def is_passed(code: Code, x: s.Operand) -> bool:
    """Whether a register is an argument or a result of a call, and no part of a struct."""
    for step, scope, _ in code.ready:
        to = step.instruction.operands[0] if step.match.form.meaning == "memory.st" else None
        if isinstance(to, s.Address) and isinstance(to.base, s.Symbol):
            place = scope.place(to.base.name)
            if place is not None and place.space == "call" and not place.variable.shape:
                if isinstance(x, s.Register) and x.name in _values(step):
                    return True
    return False


def _find(code: Code) -> frozenset[str]:
    """Names of registers that are looked at, or packed into one that is."""
    into: dict[str, set[str]] = {}
    found: set[str] = set()
    for step in code.steps:
        used, results = _uses(step)
        found |= used
        for name in results:
            into.setdefault(name, set()).update(_values(step))
    waiting = list(found)
    while waiting:
        more = into.pop(waiting.pop(), set()) - found
        found |= more
        waiting += more
    return frozenset(found)


def _uses(step: Step) -> tuple[set[str], set[str]]:
    """Registers that a step looks at, and those that it packs others into."""
    form, guard = step.match.form, step.instruction.guard
    used = {guard.register.name} if guard else set()
    results: set[str] = set()
    for spec, operand in bind(step.instruction)[1]:
        if spec.is_result:
            results.update(_registers(operand))
        elif spec.kind == "address":
            used.update(_registers(operand))
    if form.opcode in PACKING:
        return used, results
    outside = form.meaning == "memory.st" and step.match.get("space") not in ("global", "shared")
    return used if outside else used | _values(step), set()


def _values(step: Step) -> set[str]:
    """Registers whose values a step takes, but for addresses."""
    return {
        name
        for spec, operand in bind(step.instruction)[1]
        if not spec.is_result and spec.kind != "address"
        for name in _registers(operand)
    }


def _registers(x: s.Operand | None) -> Iterator[str]:
    """Names of the registers in an operand."""
    return (leaf.name for leaf in s.leaves(x) if isinstance(leaf, s.Register))
