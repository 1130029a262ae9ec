"""What a kernel did wrong."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagefuse.compiler.ptx.syntax import Instruction

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
    one; `block` and `thread` are indices of the first thread that did it, or `None`.
    """

    def __init__(
        self, kind: str, message: str, *, kernel: str = "", instruction: str = "", line: int = 0,
        file: str = "", source_line: int = 0, block: tuple[int, int, int] | None = None,
        thread: tuple[int, int, int] | None = None,
    ) -> None:  # fmt: skip
        where = [f"PTX line {line}"] if line else []
        where += [f"{file}:{source_line}"] if source_line else []
        where += [f"block {block} thread {thread}"] if thread is not None else []
        parts = [f"{kind}: {message}"]
        parts += [f"in `{shortened(instruction)}`"] if instruction else []
        parts += [f"of {kernel}"] if kernel else []
        super().__init__(" ".join(parts) + (f" ({', '.join(where)})" if where else ""))
        self.kind, self.message, self.kernel = kind, message, kernel
        self.instruction, self.line = instruction, line
        self.file, self.source_line = file, source_line
        self.block, self.thread = block, thread


class Stop(Exception):
    """A fault before it is known where: the machine adds the instruction and raises `Fault`.

    `thread` is the index within the batch of the first thread that did it, `instruction` what
    did it, where that is another one than the machine runs.
    """

    instruction: Instruction | None = None

    def __init__(self, kind: str, message: str, thread: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.thread = kind, message, thread
