"""What a processor may have beyond its level, as the functions of a module find it at run time."""

from __future__ import annotations

from stagefuse.compiler.plan import UNITS

from .ir import Code, Value

_NAME = "@sf.units"
TEXT = f"""{_NAME} = internal global i32 0, align 4

define void @sf_use_units(i32 %units) nounwind {{
  store i32 %units, ptr {_NAME}, align 4
  ret void
}}"""
"""Whoever loads a module says which of `plan.UNITS` may be used."""


def are_used(functions: str) -> bool:
    """Whether functions look at the units."""
    return f"ptr {_NAME}," in functions


def loaded(code: Code) -> Value:
    """The bits of the units that may be used."""
    return code.emit(f"load i32, ptr {_NAME}, align 4", "i32")


def has(code: Code, units: Value, *names: str) -> Value:
    """Whether one of some units is among them."""
    bits = sum(UNITS[name] for name in names)
    return code.pure(f"and i32 {units.text}, {bits}", "i32").compare("ne", 0)
