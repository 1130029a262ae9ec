"""Bytes at positions from data: vectors take them out of the words that begin there.

A register is filled with words, and not with bytes, so that the channels of a pixel come together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stagefuse.compiler.kernel_ir import Checked, Index, Kernel, Load
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.kernel_text import values_of
from stagefuse.compiler.proofs.bounds import size_of

from .bodies import walk
from .ir import Value
from .memory import Memory, MemoryWriter
from .module import Module
from .values import post_order

WORD = 4
"""Bytes that are read together."""


def _is_gathered(indices: Sequence[KernelValue]) -> bool:
    """Whether a position is read from data."""
    return any(not isinstance(value, Index) for value in indices)


class WordWriter(MemoryWriter):
    """The function of a kernel, as far as it reads words for bytes."""

    def __init__(self, kernel: Kernel, module: Module) -> None:
        super().__init__(kernel, module)
        self.words: dict[str, tuple[Value, Value]] = {}  # by pointer
        self.fit: bool | None = None  # whether words lie in their buffers, in a loop that asked

    def _words(self) -> None:
        """For buffers of bytes that are gathered, where words may be read and the last place of
        one. A buffer of less than a word is copied, so that none is that the kernel writes."""
        code, read = self.code, [b for b in self.kernel.buffers if b.name not in self.written]
        buffers = [b for b in read if b.dtype.bits == 8]
        body = walk(self.kernel.body) if buffers else ()
        loads = (part for s in body for value in values_of(s) for part in post_order(value))
        gathered = {p.buffer for p in loads if isinstance(p, Load) and _is_gathered(p.indices)}
        for buffer in buffers:
            memory = self.memory[buffer.name]
            if buffer.name not in gathered:
                continue
            count, spare = self.index(size_of(buffer.shape)), code.fresh("word")
            self.allocas.append(f"  {spare} = alloca i{8 * WORD}, align {WORD}")
            pointer = code.value(spare, "ptr")
            for place in range(WORD - 1):
                after, copy = code.label("short"), code.label("copy")
                small = count.compare("lt", WORD) & count.compare("gt", place)
                code.branch_if(small, copy, after)
                code.start(copy)
                byte = code.emit(f"load i8, ptr {self._byte_at(memory.pointer, place)}", "i8")
                code.line(f"store i8 {byte.text}, ptr {self._byte_at(pointer, place)}")
                code.branch(after)
                code.start(after)
            small = count.compare("lt", WORD)
            most = small.select(code.const(0, "i64"), count - WORD)
            self.words[memory.pointer.text] = (small.select(pointer, memory.pointer), most)

    def _byte_at(self, pointer: Value, place: int) -> str:
        return self.code.emit(f"getelementptr i8, ptr {pointer.text}, i64 {place}", "ptr").text

    def _is_scattered(self, indices: Sequence[KernelValue]) -> bool:
        """Whether positions from data differ between iterations of the loop around."""
        return self._may_scatter([v for v in indices if self._varies(self._unique(v))])

    def _may_scatter(self, indices: Sequence[KernelValue]) -> bool:
        """Whether some that a loop does not fix come from data, and none is checked there: that
        would keep the loop from being made of vectors."""
        return _is_gathered(indices) and all(map(self._is_safe, indices))

    def _is_safe(self, value: KernelValue) -> bool:
        """Whether no check is needed for a position, which may report that it is out of range."""
        parts = post_order(self._unique(value))
        return all(p.proved or id(p) in self.sound for p in parts if isinstance(p, Checked))

    def _varies(self, value: KernelValue) -> bool:
        """Whether a value depends on the index of the innermost loop, or on what is in it."""
        names = self.names(value)
        for scope in reversed(self.scopes):
            if names & (scope.indices.keys() | {f"%{name}" for name in scope.locals}):
                return True
            if scope.indices:
                break
        return False

    @contextmanager
    def _fitting(self, holds: bool) -> Iterator[None]:
        """A loop for which it is known whether its words lie in their buffers."""
        self.fit = holds
        yield
        self.fit = None

    def _words_fit(self, ahead: Sequence[KernelValue], bound: set[str]) -> Value | None:
        """Whether all words that a loop may read lie in their buffers: those of the rows that it
        reads, up to the end of a row. None if it reads no words, or was asked before, or reads some
        behind conditions: rows may be chosen by what only they allow to be read."""
        if self.fit is not None or not self.words:
            return None
        parts = (part for value in ahead for part in post_order(self._unique(value)))
        loads = [part for part in parts if isinstance(part, Load)]
        if any(load.guard for load in loads):
            return None
        found: dict[tuple[str | int | None, ...], Value] = {}
        for load in loads:
            if self.memory[load.buffer].pointer.text in self.words:
                lead = [self._unique(v) for v in load.indices[:-1]]
                fixed = [self._is_fixed(v, bound) and self._is_safe(v) for v in lead]
                loose = [v for v, one in zip(lead, fixed, strict=True) if not one]
                places = (id(v) if one else None for v, one in zip(lead, fixed, strict=True))
                key = (load.buffer, *places)
                if key not in found and self._may_scatter([*loose, load.indices[-1]]):
                    found[key] = self._fits(load, fixed)
        fits = list(found.values())
        for other in fits[1:]:
            fits[0] = fits[0] & other
        return fits[0] if fits else None

    def _fits(self, load: Load, fixed: Sequence[bool]) -> Value:
        """Whether the last word of the rows does that a loop reads, those at its fixed places."""
        memory, zero = self.memory[load.buffer], self.code.const(0, "i64")
        at = zero
        for place, extent, known in zip(load.indices, memory.shape, [*fixed, False], strict=True):
            size = self.index(extent)
            furthest = self.value(place) if known else self.code.intrinsic("smax", size - 1, zero)
            at = at * size + furthest
        return at.compare("le", self.words[memory.pointer.text][1])

    def _byte(self, memory: Memory, indices: Sequence[KernelValue]) -> Value:
        """A byte at a position from data, out of the word that begins there.

        The elements of a short innermost axis come out of the same word, and near the end of a
        buffer so do all of its last four bytes.
        """
        code, (*lead, last), first = self.code, indices, 0
        if isinstance(last, Index) and (memory.shape[-1].as_int() or WORD + 1) <= WORD:
            first = last.expr.as_int() or 0
        start = Index(last.expr - first) if isinstance(last, Index) else last
        at = self._offset(memory, (*lead, start))
        pointer, most = self.words[memory.pointer.text]
        place = at if self.fit else code.intrinsic("smin", at, most)
        address = code.pure(
            f"getelementptr inbounds i8, ptr {pointer.text}, i64 {place.text}", "ptr"
        )
        word = code.emit(
            f"load i32, ptr {address.text}, align 1{memory.alias}{self._access()}", "i32"
        )
        shift = code.const(8 * first, "i32")
        if not self.fit:
            shift = shift + (at - place).to("trunc", "i32") * 8
        byte = code.pure(f"lshr i32 {word.text}, {shift.text}", "i32")
        return byte.to("trunc", "i8")
