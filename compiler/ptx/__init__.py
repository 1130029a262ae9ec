"""PTX: the instruction table, the syntax tree, its reader, printer and builder.

Imports nothing else of ours, so that the emulator may use it.
"""

from __future__ import annotations

from .builder import Kernel, ModuleBuilder, Reg
from .check import bind, check
from .errors import PtxError
from .printer import print_instruction, print_module
from .reader import read_module
from .syntax import Module

__all__ = [
    "Kernel",
    "Module",
    "ModuleBuilder",
    "PtxError",
    "Reg",
    "bind",
    "check",
    "print_instruction",
    "print_module",
    "read_module",
]
