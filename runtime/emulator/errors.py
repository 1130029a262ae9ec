"""What a kernel did wrong."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stagefuse.compiler.ptx.syntax import Instruction, Module

    from .groups import Call
    from .program import Code, Step

_LONG_LIST = re.compile(r"\{([^,{}]+), ([^,{}]+)(?:, [^,{}]+){7,}, ([^,{}]+)\}")
KINDS = ("out-of-bounds", "misaligned", "uninitialised", "race", "barrier", "deadlock", "trap")


def shortened(instruction: str) -> str:
    """An instruction for a message: of a long list of registers the first two and the last.

    >>> shortened("wgmma {%f1, %f2, %f3, %f4, %f5, %f6, %f7, %f8, %f9, %f10}, %d1;")
    'wgmma {%f1, %f2, ..., %f10}, %d1;'
    """
    return _LONG_LIST.sub(r"{\1, \2, ..., \3}", instruction)


class Fault(RuntimeError):
    """A fault of a kernel, where the emulator stopped.

    `kind` is one of `KINDS`. `line` is the line of the PTX text and `instruction` what stands
    there; `file` and `source_line` are the source position that its `.loc` says, "" and 0 without
    one; `callers` are the places in words where its function was inlined, or called from, inner
    ones first; `block` and `thread` are indices of the first thread that did it, or `None`.
    `other_line` is the line of a race's other access, 0 where it is not known.
    """

    def __init__(
        self, kind: str, message: str, *, kernel: str = "", instruction: str = "", line: int = 0,
        file: str = "", source_line: int = 0, block: tuple[int, int, int] | None = None,
        thread: tuple[int, int, int] | None = None, callers: tuple[str, ...] = (),
        other: Instruction | None = None,
    ) -> None:  # fmt: skip
        where = [f"PTX line {line}"] if line else []
        where += [f"{file}:{source_line}"] if source_line else []
        where += callers
        where += [f"block {block} thread {thread}"] if thread is not None else []
        parts = [f"{kind}: {message}"]
        parts += [f"in `{shortened(instruction)}`"] if instruction else []
        parts += [f"of {kernel}"] if kernel else []
        super().__init__(" ".join(parts) + (f" ({', '.join(where)})" if where else ""))
        self.kind, self.message, self.kernel = kind, message, kernel
        self.instruction, self.line = instruction, line
        self.file, self.source_line = file, source_line
        self.block, self.thread, self.callers = block, thread, callers
        self.other_line = other.line if other is not None else 0


MOST_CALLERS = 4
"""How many callers a message names."""


def callers_of(code: Code, x: Instruction, stack: Sequence[Call], module: Module) -> list[str]:
    """Where the function of an instruction was inlined, and called from; see `Fault.callers`."""
    found: list[str] = []
    for function, step in [(code, x), *((f.code, f.code.steps[at].instruction)
                                        for f, at, _ in reversed(stack))]:  # fmt: skip
        loc = step.loc
        if step is not x:
            place = f" ({module.file(loc.file)}:{loc.line})" if loc else ""
            found.append(f"called at PTX line {step.line}{place}")
        inlined = {(o.loc.file, o.loc.line, o.loc.column): o.loc for o in
                   (s.instruction for s in function.steps) if o.loc and o.loc.inlined}  # fmt: skip
        while loc and loc.inlined and len(found) < MOST_CALLERS:
            file, line, column = map(int, loc.inlined.split()[-3:])
            found.append(f"inlined at {module.file(file)}:{line}")
            loc = inlined.get((file, line, column))
    return found[:MOST_CALLERS]


class Stop(Exception):
    """A fault before it is known where: the machine adds the instruction and raises `Fault`.

    `thread` is the index within the batch of the first thread that did it, `instruction` what
    did it, where that is another one than the machine runs. `other` made the other access of a
    race, where that is known.
    """

    instruction: Instruction | None = None

    def __init__(
        self, kind: str, message: str, thread: int | None = None, other: Step | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.thread, self.other = kind, message, thread, other
