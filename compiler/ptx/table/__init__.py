"""The instruction table: every form of every instruction that we read, write and run.

A family is a module of this folder with a tuple `FORMS`; a new module is found by itself. What a
row says is in `record.py`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import import_module

from stagefuse.compiler.ptx.errors import PtxError

from .record import SLOTS, Form, Match, OperandSpec

__all__ = ["SLOTS", "Form", "Match", "OperandSpec", "forms", "matches"]


@cache
def forms() -> dict[str, tuple[Form, ...]]:
    """All forms by opcode, in the order of the table."""
    found: dict[str, list[Form]] = {}
    for name in families():
        for form in import_module(f"{__name__}.{name}").FORMS:
            found.setdefault(form.opcode, []).append(form)
    return {opcode: tuple(rows) for opcode, rows in found.items()}


_ABSENT = {
    **dict.fromkeys(("tex", "tld4", "txq", "istypep"), "textures"),
    **dict.fromkeys(("suld", "sust", "sured", "suq"), "surfaces"),
    "multimem": "addresses of several devices",
    **dict.fromkeys(("tcgen05", "clusterlaunchcontrol"), "instructions since sm_100"),
}
"""Opcodes of the ISA that no row has, and what they are for."""


def families() -> tuple[str, ...]:
    """The modules of the table, sorted by name."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if name != "record"))


@lru_cache(maxsize=4096)
def matches(opcode: str, modifiers: tuple[str, ...]) -> tuple[Match, ...]:
    """The forms that these modifiers can be; their operands tell them apart.

    Raises: PtxError that names an instruction which the table does not have.
    """
    name = ".".join((opcode, *modifiers))
    rows = forms().get(opcode)
    if rows is None:
        why = _ABSENT.get(opcode.split(".")[0])
        raise PtxError(f"unknown instruction `{name}`: " + (
            f"{why} are not in the table" if why else f"there is no `{opcode}`"))  # fmt: skip
    found = [match for form in rows if (match := form.match(modifiers)) is not None]
    if not found:  # ptxas takes modifiers in any order, and headers and libraries rely on it
        found = [match for form in rows if (match := form.match_unordered(modifiers)) is not None]
    if not found:
        raise PtxError(f"unknown instruction `{name}`: no `{opcode}` has these modifiers; "
                       f"there is {_some(form.pattern() for form in rows)}")  # fmt: skip
    return tuple(found)


def _some(patterns: Iterable[str], most: int = 6) -> str:
    names = list(dict.fromkeys(patterns))
    return ", ".join(f"`{name}`" for name in names[:most]) + (", ..." if names[most:] else "")
