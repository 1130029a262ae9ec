"""Schedules: how much of a kernel one parallel step does, as plain values for a kind of target.

The same group of nodes lowers to the same loops under any schedule; only the sizes of blocks and
tiles differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from types import MappingProxyType

from stagefuse.dsl.frozen import frozen


@frozen
class Schedule:
    """Sizes in elements unless said otherwise.

    `chunk`: what one parallel step of a flat pointwise kernel handles. `columns`: adjacent columns
    that a column reduction accumulates side by side, `rows_together` rows of them at a time.
    `row_tile`: rows of a product's scratch tile by the width of its panels, `byte_rows` where its
    operands are of 8 bits, for all of which a panel is put in order once; `lone_tile`: the same
    where a product of packed panels is all that a kernel has, for as many rows in all of its tiles.
    `tiles_per_block`, `panel_group`: tiles down and panels across that one step of a product
    computes, at most; the tiles' rows of the left operand are no more than `block_bytes`, so that
    they stay in the second-level cache. `packed_tiles`: tiles down where a step packs its panels
    itself.
    `deep_tiles`, `deep_panels`: tiles down and panels across where four tiles are too many bytes,
    half of the tiles if there would be fewer than `deep_steps` then; `depth_block` of the sum is
    done at a time for all of them, and `codes_block` where panels
    are computed of codes, whose part then stays in the first-level cache.
    `columns_by_memory`: whether reductions whose memory runs along a kept axis accumulate columns
    side by side whatever axis they are written along.
    `stripes`: whether reductions over windows of an image read it from scratch, with its edges.
    `direct`: whether products that nothing follows are stored in the result at once.
    `stage_flops`: a value this dear that several passes over a row need is kept in a scratch row.
    `step_flops`: arithmetic that makes a parallel step worth handing to another thread;
    `turn_flops`: the same in a recurrence, whose threads would meet at every one of its steps.
    `parts`: parts of a concatenation that one loop chooses among, at most.
    `packed`: elements of a pixel of 8 bits each that are read together, at most.
    `tile_columns`: columns of a tile that warpgroups compute, at most, 0 where none do.
    `tensor_copies`: whether tensor copies bring the operands of such tiles.
    `short_forms`: whether quotients by what a row shares are products, and functions of 16-bit
    floats need to be no more exact than those.
    """

    chunk: int = 4096
    columns: int = 256
    rows_together: int = 8
    columns_by_memory: bool = True
    stripes: bool = True
    row_tile: Mapping[int, int] = field(default_factory=dict)
    lone_tile: Mapping[int, int] = field(default_factory=dict)
    byte_rows: int = 256
    tiles_per_block: int = 8
    block_bytes: int = 800_000
    packed_tiles: int = 8
    deep_tiles: int = 16
    deep_panels: int = 4
    deep_steps: int = 32
    panel_group: int = 1
    depth_block: int = 2048
    codes_block: int = 128
    direct: bool = True
    stage_flops: int = 8
    step_flops: int = 16384
    turn_flops: int = 262144
    parts: int = 1
    packed: int = 4
    tile_columns: int = 0
    tensor_copies: bool = False
    short_forms: bool = False


CPU = Schedule(row_tile=MappingProxyType({48: 32, 64: 32, 32: 32, 16: 32}))
"""Row tiles are whole tiles of AMX, come close to whole register tiles of AVX-512 and AVX2, and
fit the first-level cache: 32 x 48 f32 are 6 KB. So do 256 columns. A panel of 2048 rows is 393 KB
and shares the second-level cache with a tile's rows of the left operand."""

CPU_NARROW = replace(CPU, lone_tile=MappingProxyType({16: 96}))
"""Where all panels have 16 columns, as for AVX2 alone. 96 x 16 f32 are 6 KB too, and 16 whole
register tiles. On Zen 4 products of 1024 each way take 0.92 of the time that tiles of 32 rows and
stretches of 512 take, of 2048 0.91."""

GPU = Schedule(
    chunk=2048,
    columns=128,
    rows_together=1,
    columns_by_memory=False,
    stripes=False,
    row_tile=MappingProxyType({48: 64, 64: 64, 32: 64, 16: 64}),
    tiles_per_block=1,
    block_bytes=1 << 60,
    packed_tiles=1,
    deep_tiles=1,
    deep_panels=1,
    panel_group=1,
    depth_block=1 << 40,
    codes_block=1 << 40,
    direct=False,
    stage_flops=1 << 40,
    parts=8,
    packed=0,
    short_forms=True,
)
"""Nothing is staged: what registers hold is not computed twice, and what they cannot hold costs
more to keep than to compute. A chunk is two vectors of 16 bytes of f32 for each of 256 lanes. A
block of a product computes one tile over the whole depth."""

GPU_CHAIN = replace(
    GPU,
    stage_flops=CPU.stage_flops,
    row_tile=MappingProxyType({48: 32, 64: 32, 32: 32, 16: 32}),
)
"""Rows between two products: so many fit a block's shared memory."""

GPU_HALF = replace(GPU, row_tile=MappingProxyType({48: 128, 64: 128, 32: 128, 16: 128}))
"""Products of 16-bit operands, which need more arithmetic for each byte."""

GPU_WGMMA = replace(GPU_HALF, tile_columns=256)
"""The same for Hopper's warpgroups: four panels of 64 columns."""

GPU_CODES = replace(GPU_HALF, tile_columns=128)
"""The same where lanes compute the right operand: an SM holds two blocks, of which one multiplies
while the other computes."""

GPU_TMA = replace(GPU_WGMMA, tensor_copies=True)
"""The same where tensor maps can have the operands."""

TRIALS: Mapping[str, Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "cpu": {
            "tiles_per_block": (3, 4, 16),
            "block_bytes": (200_000, 400_000, 1_600_000),
            "packed_tiles": (4, 16),
            "deep_tiles": (8, 32),
            "deep_panels": (2, 8),
            "depth_block": (512, 1024),
            "panel_group": (2,),
            "chunk": (1024, 16384),
            "columns": (64, 512),
            "step_flops": (4096, 65536, 262_144),
        }
    }
)
"""What `--tune` tries by target, one change at a time, against the rules' choice; for GPUs that is
in `gpu/structures.py`."""
