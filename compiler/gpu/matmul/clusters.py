"""Blocks of a cluster that share the depth of a product, and what each of them finishes.

The last parallel loop of such a kernel is `RANK`: every step of it is to have the same tile and to
finish its own rows of it. The blocks that take these steps are a cluster; each multiplies a stretch
of the depth, and sums its rows of what all of them found, read from their shared memory in the
order of the stretches (PTX ISA 9.7.9.22, "mapa", and 9.7.13.4, "barrier.cluster").
"""

from __future__ import annotations

from stagefuse.compiler.gpu.ir import Value
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym

from .async_copies import Tile
from .wgmma_tiles import WgmmaWriter

RANK = "rank"
VECTOR = 4
Loops = list[tuple[str, Expr]]


class ClusterWriter(WgmmaWriter):
    """The body of a kernel, as far as clusters go."""

    @property
    def cluster(self) -> int:
        """How many blocks are a cluster."""
        name, extent = self.kernel.parallel[-1] if self.kernel.parallel else ("", const(1))
        return (extent.as_int() or 1) if name == RANK else 1

    def own_stretch(self, tile: Tile) -> tuple[Expr, Expr]:
        """The block's stretch of a product's depth, in whole stages: its begin and length."""
        depth = tile.s.depth
        if self.cluster == 1:
            return const(0), depth
        all_stages = tile.depth * self.cluster
        stretch = floordiv(depth + (all_stages - 1), all_stages) * tile.depth
        begin = sym(RANK) * stretch
        if stretch * self.cluster == depth:
            return begin, stretch
        return begin, maximum(minimum(depth - begin, stretch), const(0))

    def sum_of_cluster(self, tile: Tile, base: Expr) -> list[Value]:
        """The block's rows of the tile, whose parts lie in the tiles of the cluster: summed, and
        stored in this block's."""
        code, memory, lanes = self.code, self.memory[tile.s.dst], self.team.lanes
        self._rendezvous()
        across = tile.columns // VECTOR
        rows = tile.rows // self.cluster
        assert memory.start is not None
        loaded: list[tuple[Expr, Value, list[list[Value]]]] = []
        for n in range(-(-rows * across // lanes)):  # all are on the way before one is waited for
            flat = sym("lane") + n * lanes
            row, column = floordiv(flat, across), mod(flat, across) * VECTOR
            place = base + (sym(RANK) * rows + row) * tile.s.dst_row + column
            own = self.holds("lt", flat, const(rows * across))
            at = memory.start + self.index(place, "i32") * memory.dtype.itemsize
            parts = [self._of_peer(at, rank, own) for rank in range(self.cluster)]
            loaded.append((place, own, parts))
        found: list[Value] = []
        for place, own, (sums, *others) in loaded:
            for part in others:
                for total, value in zip(sums, part, strict=True):
                    code.write("add.rn.f32", total, total, value)
            with self.when(own):
                self.write(memory, self.address(memory, (place, None)), sums)
            found += sums
        self._rendezvous()
        return found

    def _of_peer(self, at: Value, rank: int, own: Value) -> list[Value]:
        """Adjacent elements at an address of the shared memory of a block of the cluster."""
        code = self.code
        peer = code.emit("mapa.shared::cluster.u32", "i32", at, code.const(rank, "i32"))
        found = [code.variable("float", code.const(0.0, "float")) for _ in range(VECTOR)]
        listed = ", ".join(v.text for v in found)
        code.line(f"{code.guarded(own)}ld.shared::cluster.v4.f32 {{{listed}}}, [{peer.text}];")
        return found

    def _rendezvous(self) -> None:
        """Blocks of the cluster wait for each other and see what the others wrote."""
        self.code.line("barrier.cluster.arrive.aligned;")
        self.code.line("barrier.cluster.wait.aligned;")
        self.unread, self.unwritten = set(), set()


def in_cluster(loops: Loops, rows: int, split: int) -> tuple[Loops, tuple[Expr, Expr]]:
    """The loops over blocks, of which `split` share a tile, and the rows of it that one stores."""
    if split == 1:
        return loops, (const(0), const(rows))
    own = rows // split
    return [*loops, (RANK, const(split))], (sym(RANK) * own, sym(RANK) * own + own)
