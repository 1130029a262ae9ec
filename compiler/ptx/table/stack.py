"""Memory on a thread's stack (PTX ISA, "Stack Manipulation Instructions")."""

from __future__ import annotations

from .record import Form

_SECTION = "Stack Manipulation Instructions"


def _stack(opcode: str, operands: str, summary: str) -> Form:
    return Form(opcode, "T", operands, f"stack.{opcode}", _SECTION, {"T": "u32 u64"}, (7, 3), 52,
                summary=summary)  # fmt: skip


FORMS = (
    _stack("alloca", ">d:T n:T #align:u32?", "n bytes of local memory until the function returns"),
    _stack("stacksave", ">d:T", "where the stack ends now"),
    _stack("stackrestore", "a:T", "free what was allocated since a was saved"),
)
