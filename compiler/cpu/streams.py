"""Loops that write large results past the caches.

A store that misses the caches first reads the line that it overwrites. Results far larger than the
caches are therefore written with non-temporal stores, whole lines at a time (Intel 64 and IA-32
Optimization Reference Manual, section 9.6.1): a tile of the loop is computed into registers or the
stack and stored from there. Whether the results are that large, and aligned, is seen at run time;
otherwise, and for the rest of a row, the plain loop runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from stagefuse.compiler.kernel_ir import For, Index, Let, Load, Store
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.proofs.bounds import size_of
from stagefuse.dsl.dims import const

from . import scalars
from .bodies import is_walk, values_of
from .ir import Value
from .loops import SHORT_LOOP, LoopWriter
from .memory import Memory
from .values import post_order

LARGE_BYTES = 32 << 20
"""Results of this size together are not in the caches when their reader comes."""
LONG = 256
"""Elements of a loop that streams: in shorter rows the tiles cost more than they save."""
TILE = 64
"""Elements of a tile: at least one line of 64 bytes of any dtype."""
LINE = 64
AHEAD_BYTES = 8192
"""How far before their turn lines are asked for. The hardware's prefetching ends with a page and
begins anew in the next: one core reads 11.8 GB/s so, and 14.6 with what is asked for, on the
machine of docs/performance.md."""


class StreamWriter(LoopWriter):
    """The function of a kernel, with the loops that may stream their results."""

    def _for(self, s: For) -> None:
        stores = [x for x in s.body if isinstance(x, Store)]
        if not self._may_stream(s, stores):
            super()._for(s)
            return
        code = self.code
        lo, hi = self.index(s.lo), self.index(s.hi)
        tiles, plain = code.label("stream"), code.label("plain")
        streams = self._streams(s, stores, lo, hi)
        before = code.block
        code.branch_if(streams, tiles, plain)
        code.start(tiles)
        with self._scope():
            end = lo + ((hi - lo) & -TILE)
            self._tiles(s, stores, lo, end)
        last = code.block
        code.branch(plain)
        code.start(plain)
        rest = code.emit(f"phi i64 [ {lo.text}, %{before} ], [ {end.text}, %{last} ]", "i64")
        self._plain(s, rest, hi)
        self.has_streams = True

    def _may_stream(self, s: For, stores: list[Store]) -> bool:
        """Whether every store of a loop walks along a result of its own, element by element."""
        extent = (s.hi - s.lo).as_int()
        names = [x.buffer for x in stores]
        return (
            s.vector
            and (extent is None or extent > SHORT_LOOP)
            and bool(stores)
            and all(isinstance(x, Let | Store) for x in s.body)
            and len(set(names)) == len(names)
            and all(
                x.buffer in self.results and is_walk(x, self.memory[x.buffer].shape, s.index)
                for x in stores
            )
        )

    def _streams(self, s: For, stores: list[Store], lo: Value, hi: Value) -> Value:
        """Whether a loop is long, and all its results are large and begin on a line."""
        streams = (hi - lo).compare("ge", LONG)
        total = const(0)
        for store in stores:
            memory = self.memory[store.buffer]
            total = total + size_of(memory.shape) * memory.dtype.itemsize
            with self._inner_scope():
                self.scopes[-1].indices[s.index] = lo
                at = self._address(memory, store.indices)
            place = self.code.pure(f"ptrtoint ptr {at.text} to i64", "i64")
            streams = streams & (place & (LINE - 1)).compare("eq", 0)
        return streams & self.index(total).compare("ge", LARGE_BYTES)

    def _place_row(self) -> None:
        """The scratch row of an iteration lies in the result's place, unless that is streamed."""
        if (found := self.row_in_result) is None:
            return
        last, scratch, result = found.last, self.scratch_row, self.memory[found.store.buffer]
        assert scratch is not None
        lo, hi = self.index(last.lo), self.index(last.hi)
        with self._inner_scope():
            self.scopes[-1].indices[last.index] = lo
            place = self._address(result, found.store.indices)
        stores = [x for x in last.body if isinstance(x, Store)]
        if self._may_stream(last, stores):
            place = self._streams(last, stores, lo, hi).select(scratch, place)
        self.memory[found.row].pointer = place

    def _tiles(self, s: For, stores: list[Store], lo: Value, end: Value) -> None:
        """The whole tiles of a loop, each computed and then stored past the caches."""
        code = self.code
        count = (end - lo).ashr(TILE.bit_length() - 1)
        tiles = {x.buffer: self._stack(self.memory[x.buffer]) for x in stores}
        zero, size = code.const(0, "i64"), code.const(TILE, "i64")
        ahead = list(values_of(s.body))

        def tile(number: Value, _: list[Value]) -> list[Value]:
            first = lo + number.shl(TILE.bit_length() - 1)

            def element(i: Value, _: list[Value]) -> list[Value]:
                self.scopes[-1].indices[s.index] = first + i
                self.tiles = {name: (place, i) for name, place in tiles.items()}
                self.statements(s.body)
                self.tiles = {}
                return []

            with self._inner_scope():
                self.scopes[-1].indices[s.index] = first
                for row in self._own_rows(ahead, s.index):
                    self._ask(row, TILE * self.memory[row.buffer].dtype.itemsize)
            self._loop(zero, size, [], element, ahead, {s.index}, True, True)
            for store in stores:
                with self._inner_scope():
                    self.scopes[-1].indices[s.index] = first
                    self._flush(store, tiles[store.buffer])
            return []

        self._loop(zero, count, [], tile, ahead, {s.index}, False, False)

    def _own_rows(self, values: Iterable[KernelValue], name: str) -> list[Load]:
        """What values read along rows of inputs that no other step of the kernel reads, the first
        place of each input."""
        inputs = {b.name for b in self.kernel.buffers if b.mode == "in"}
        steps = {n for n, e in self.kernel.parallel if e.as_int() != 1}
        found: dict[str, Load] = {}
        for part in (part for value in values for part in post_order(value)):
            if not isinstance(part, Load) or part.buffer not in inputs or part.guard:
                continue
            *lead, last = [v.expr if isinstance(v, Index) else None for v in part.indices] or [None]
            if last is None or last.coefficient(name) != const(1) or None in lead:
                continue
            if steps <= frozenset[str]().union(*(e.symbols() for e in lead if e is not None)):
                found.setdefault(part.buffer, part)
        return list(found.values())

    def _ask(self, row: Load, size: int) -> None:
        """Asks for the lines of so many bytes of a row, some pages ahead."""
        code, memory = self.code, self.memory[row.buffer]
        at = self._address(memory, row.indices)
        for line in range(0, size, LINE):
            ahead = code.emit(f"getelementptr i8, ptr {at.text}, i64 {AHEAD_BYTES + line}", "ptr")
            code.line(f"call void @llvm.prefetch.p0(ptr {ahead.text}, i32 0, i32 3, i32 1)")

    def _stack(self, memory: Memory) -> Value:
        """A tile of elements on the stack."""
        name = self.code.fresh("tile")
        kind = scalars.MEMORY[memory.dtype.name]
        self.allocas.append(f"  {name} = alloca [{TILE} x {kind}], align {LINE}")
        return self.code.value(name, "ptr")

    def _flush(self, store: Store, tile: Value) -> None:
        """A tile from the stack to where its loop would have stored it."""
        code, memory = self.code, self.memory[store.buffer]
        at = self._address(memory, store.indices)
        kind, size = scalars.MEMORY[memory.dtype.name], memory.dtype.itemsize
        width = (32 if self.module.level == "v3" else 64) // size
        vector = f"<{width} x {kind}>"
        mark = self.module.node("!{i32 1}")
        for first in range(0, TILE, width):
            source = code.pure(f"getelementptr {kind}, ptr {tile.text}, i64 {first}", "ptr")
            target = code.pure(f"getelementptr {kind}, ptr {at.text}, i64 {first}", "ptr")
            value = code.emit(f"load {vector}, ptr {source.text}, align {width * size}", vector)
            code.line(
                f"store {vector} {value.text}, ptr {target.text}, align {width * size},"
                f" !nontemporal {mark}{memory.alias}"
            )
