"""Products of f32 on AMX, whose tiles multiply bf16: the micro-kernel as LLVM IR.

Each factor is cut exactly into three bf16 pieces, high, middle and low, of 8 bits each; a product
is six products of pieces, and what the other three would add is below 2^-26 of it. The sums are
kept in f32, so that the error is that of f32 products, and the rate 2.7 times theirs by the
instructions' throughput. Numbers that come of bf16 are their high pieces: where all of a factor
are, three products are left, and one where all of both are.

A block of rows and a panel are cut where they are first needed and kept in the thread's scratch: a
*cache*. What cannot be cut so that no piece or product leaves f32's normal range (an infinity, a
NaN, a number outside 2^-62 to 2^62 or, in a panel, below 2^-40; 0 can) is noted there, and is
multiplied by the micro-kernel of vectors instead.

Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS; Intel 64
and IA-32 Architectures Optimization Reference Manual, chapter 20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle

from . import halves
from .cutting import (
    BAD,
    FLOATS,
    HALVES,
    PIECES,
    STEP,
    panel_bytes,
    panel_symbol,
    panel_text,
    row_bytes,
    rows_symbol,
    rows_text,
)

ROWS = 32
"""Of a product's tile."""
ENTRIES = 64
"""Tiles of rows that a cache holds at most: eight over a depth of 4096, in stretches of 512."""
LEAST_ROWS, LEAST_DEPTH = 16, 24
"""With fewer rows to use it for, cutting a panel takes longer than it saves; with fewer steps, most
of a tile are zeros."""
LEAST_COLUMNS = 192
"""With fewer columns to use them for, cutting rows does: for 1000 rows, a depth of 1000 and 144
columns of two inputs that of pieces takes 1.06 times as long, for 192 columns 1.0, for 240 0.95.
Where neither depth nor rows are many, for 100 x 100 x 144, it takes 1.2 times as long."""
HEADER = 64 + 16 * ENTRIES
APART = 7
"""Lines that are fetched between two instructions of tiles. Where another hyperthread shares the
core, such instructions hold each other up if less than eight operations are between them: a step
takes 1.65 times as long without these (an address makes eight). Where none does, they cost
nothing."""
LINE = 64
_FEATURES = 'nounwind "target-features"="+amx-tile,+amx-bf16"'
DECLARATIONS = """declare void @sf.pieces.begin() nounwind
declare void @sf.pieces.end() nounwind"""


def symbol(columns: int, placed: bool) -> str:
    return f"sf.pieces.{columns}{'.places' if placed else ''}"


def is_symbol(name: str) -> bool:
    return name.startswith("sf.pieces.")


def tiles_text() -> str:
    """What all micro-kernels that use AMX share: a configuration of eight tiles of 16 rows of 64
    bytes."""
    sizes = ", ".join(["i8 1", *["i8 0"] * 15, *["i8 64", "i8 0"] * 8, *["i8 0"] * 16])
    sizes += ", " + ", ".join(["i8 16"] * 8 + ["i8 0"] * 8)
    return f"""
@sf.pieces.tiles = internal constant [64 x i8] [{sizes}], align 64
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
define void @sf.pieces.begin() {_FEATURES} {{
  call void @llvm.x86.ldtilecfg(ptr @sf.pieces.tiles)
  ret void
}}

define void @sf.pieces.end() {_FEATURES} {{
  call void @llvm.x86.tilerelease()
  ret void
}}"""


def shared_text() -> str:
    """What the micro-kernels of all widths share: cutting rows."""
    return f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
{halves.DECLARATION}
declare {FLOATS} @llvm.masked.load.v16f32.p0(ptr, <16 x i1>, {FLOATS})
declare {HALVES} @llvm.umin.v32i16({HALVES}, {HALVES})
declare {HALVES} @llvm.umax.v32i16({HALVES}, {HALVES})

{rows_text(3)}

{rows_text(1)}"""


def tile_text(columns: int, placed: bool, vectors: str) -> str:
    """The function `symbol(dst, dst_row, a, a_row, panel, places, rows, depth, width, add, cache,
    entries, most, ready, mark, tiled)`: as `tile.tile_text`'s, for at most 32 rows; all 32 of dst
    are there to be overwritten. `placed`: whether the panel's rows lie at places, or are packed.

    `cache` is null where pieces may not be used; it holds `entries` tiles of rows and a panel, of
    at most `most` steps, a multiple of 32. `ready`, `mark`: the panel's pieces and its mark, or
    null. `tiled`: whether there are tiles; else high pieces alone are multiplied, by `halves`.
    `vectors`: the micro-kernel for what it does not take.
    """
    panels = ([*panel_text(columns, placed, pieces), ""] for pieces in (3, 1))
    parts = (_tile(columns, placed, vectors), [""], *panels)
    return "\n".join(line for part in parts for line in part)


def _tile(columns: int, placed: bool, vectors: str) -> list[str]:
    most = min(columns // 16, 2)
    out = [
        f"define void @{symbol(columns, placed)}(ptr noalias %dst, i64 %dst_row, ptr readonly %a,"
        " i64 %a_row, ptr readonly %panel, ptr readonly %places, i64 %rows, i64 %depth,"
        " i64 %width, i1 %add, ptr %cache, i64 %entries, i64 %most, ptr %ready, ptr %mark,"
        f" i1 %tiled) noinline noduplicate {_FEATURES} {{",
        "entry:",
        "  %off = icmp eq ptr %cache, null",
        f"  %few = icmp slt i64 %rows, {LEAST_ROWS}",
        f"  %short = icmp slt i64 %depth, {LEAST_DEPTH}",
        "  %small = or i1 %few, %short",
        "  %not = or i1 %off, %small",
        "  br i1 %not, label %vectors, label %begin",
        "begin:",
        "  br i1 %tiled, label %look, label %guess",
        *halves.guess(placed),
        "vectors:",
        f"  call void @{vectors}(ptr %dst, i64 %dst_row, ptr %a, i64 %a_row, i64 1, ptr %panel,"
        " i64 0, ptr %places, i64 %rows, i64 %depth, i64 %width, i1 %add)",
        "  ret void",
        *_rows_at_hand(),
        *_panel_at_hand(columns, placed),
        "multiply:",
        "  %said = or i64 %rows_flags, %panel_flags",
        f"  %bad = and i64 %said, {BAD}",
        "  %fine = icmp eq i64 %bad, 0",
        f"  %rows_more = and i64 %rows_flags, {PIECES}",
        "  %left_has = icmp ne i64 %rows_more, 0",
        f"  %panel_more = and i64 %panel_flags, {PIECES}",
        "  %right_has = icmp ne i64 %panel_more, 0",
        "  br i1 %fine, label %choose, label %vectors",
        "choose:",
        "  br i1 %tiled, label %tiles, label %alone",
        "alone:",
        "  %said_more = or i1 %left_has, %right_has",
        "  br i1 %said_more, label %vectors, label %halves",
        "halves:",
        f"  call void @{halves.symbol(columns)}(ptr %dst, i64 %dst_row, ptr %left, ptr %right,"
        " i64 %rows, i64 %depth, i64 %width, i1 %add)",
        "  ret void",
        "tiles:",
        "  %bytes = shl i64 %dst_row, 2",
        "  %low_dst = getelementptr i8, ptr %dst, i64 0",
        "  %sixteen = shl i64 %bytes, 4",
        "  %high_dst = getelementptr i8, ptr %dst, i64 %sixteen",
        "  %two = icmp sgt i64 %rows, 16",
        f"  br i1 %two, label %r2c{most}, label %r1c{most}",
    ]
    for high in (2, 1):
        for wide in [2] * (columns >= 32) + [1] * (columns % 32 > 0):
            out += _register_tiles(high, wide, columns)
    return [*out, "return:", "  ret void", "}"]


def _rows_at_hand() -> list[str]:
    """Finds the cut rows in the cache, or cuts them into its place that was filled longest ago."""
    return [
        "look:",
        "  %key = ptrtoint ptr %a to i64",
        "  %keys = getelementptr i8, ptr %cache, i64 64",
        f"  %flags = getelementptr i8, ptr %cache, i64 {64 + 8 * ENTRIES}",
        f"  %each_step = select i1 %tiled, i64 {row_bytes(3) // STEP}, i64 {row_bytes(1) // STEP}",
        "  %entry_bytes = mul i64 %most, %each_step",
        f"  %room = getelementptr i8, ptr %cache, i64 {HEADER}",
        "  br label %search",
        "search:",
        "  %e = phi i64 [ 0, %look ], [ %e1, %other ]",
        "  %key_at = getelementptr i64, ptr %keys, i64 %e",
        "  %there = load i64, ptr %key_at, align 8",
        "  %found = icmp eq i64 %there, %key",
        "  br i1 %found, label %have, label %other",
        "other:",
        "  %e1 = add i64 %e, 1",
        "  %on = icmp slt i64 %e1, %entries",
        "  br i1 %on, label %search, label %cut",
        "cut:",
        "  %turn = load i64, ptr %cache, align 8",
        "  %turn1 = add i64 %turn, 1",
        "  %wraps = icmp sge i64 %turn1, %entries",
        "  %turn2 = select i1 %wraps, i64 0, i64 %turn1",
        "  store i64 %turn2, ptr %cache, align 8",
        "  %cut_skip = mul i64 %turn, %entry_bytes",
        "  %cut_to = getelementptr i8, ptr %room, i64 %cut_skip",
        "  br i1 %tiled, label %cut3, label %cut1",
        *_either("cut", rows_symbol, "ptr %a, i64 %a_row, i64 %rows, i64 %depth, ptr %cut_to"),
        "  %cut_key = getelementptr i64, ptr %keys, i64 %turn",
        "  store i64 %key, ptr %cut_key, align 8",
        "  %cut_flag_at = getelementptr i64, ptr %flags, i64 %turn",
        "  store i64 %cut_flags, ptr %cut_flag_at, align 8",
        "  br label %have",
        "have:",
        "  %n = phi i64 [ %e, %search ], [ %turn, %cut_done ]",
        "  %skip = mul i64 %n, %entry_bytes",
        "  %left = getelementptr i8, ptr %room, i64 %skip",
        "  %flag_at = getelementptr i64, ptr %flags, i64 %n",
        "  %rows_flags = load i64, ptr %flag_at, align 8",
    ]


def _either(name: str, symbol: Callable[[int], str], arguments: str) -> list[str]:
    """Calls what cuts into three pieces, from the block `name`3, or into high ones, from `name`1:
    `name_flags` in the block `name_done` is what it says."""
    out = []
    for pieces in (3, 1):
        out += [
            f"{name}{pieces}:",
            f"  %{name}_flags{pieces} = call i64 @{symbol(pieces)}({arguments})",
            f"  br label %{name}_done",
        ]
    return [
        *out,
        f"{name}_done:",
        f"  %{name}_flags = phi i64 [ %{name}_flags3, %{name}3 ], [ %{name}_flags1, %{name}1 ]",
    ]


def _panel_at_hand(columns: int, placed: bool) -> list[str]:
    """Cuts the panel unless it was beforehand, or is the last one that was."""
    return [
        "  %is_ready = icmp ne ptr %ready, null",
        "  br i1 %is_ready, label %panel_ready, label %panel_look",
        "panel_ready:",
        "  br label %panel_have",
        "panel_look:",
        "  %behind = mul i64 %entries, %entry_bytes",
        "  %own = getelementptr i8, ptr %room, i64 %behind",
        "  %panel_key_at = getelementptr i8, ptr %cache, i64 8",
        "  %panel_flag_at = getelementptr i8, ptr %cache, i64 16",
        "  %panel_key = ptrtoint ptr %panel to i64",
        "  %panel_there = load i64, ptr %panel_key_at, align 8",
        "  %panel_found = icmp eq i64 %panel_there, %panel_key",
        "  br i1 %panel_found, label %panel_have, label %panel_cut",
        "panel_cut:",
        "  br i1 %tiled, label %panel_cut3, label %panel_cut1",
        *_either(
            "panel_cut",
            lambda pieces: panel_symbol(columns, placed, pieces),
            "ptr %panel, ptr %places, i64 %depth, ptr %own",
        ),
        "  store i64 %panel_key, ptr %panel_key_at, align 8",
        "  store i64 %panel_cut_flags, ptr %panel_flag_at, align 8",
        "  br label %panel_have",
        "panel_have:",
        "  %right = phi ptr [ %ready, %panel_ready ], [ %own, %panel_look ],"
        " [ %own, %panel_cut_done ]",
        "  %panel_flags_at = phi ptr [ %mark, %panel_ready ], [ %panel_flag_at, %panel_look ],"
        " [ %panel_flag_at, %panel_cut_done ]",
        "  %panel_flags = load i64, ptr %panel_flags_at, align 8",
        "  br label %multiply",
    ]


_PAIRS = ((0, 0), (0, 2), (0, 1), (1, 1), (1, 0), (2, 0))
"""Pieces that are multiplied (0 high, 1 middle, 2 low), so that one of two stays for the next."""
_NEXT = {
    0: ("right_has", "pair1", "left"),
    2: ("left_has", "pair3", "end"),
    5: ("", "end", ""),
}
"""What follows a pair where that is not the next one in any case: after which condition, or else.
Where a side has high pieces alone, the products of its others are left out."""


def begin_sums(n: str, sums: Sequence[tuple[int, int]]) -> list[str]:
    """The tile registers of sums as `add` says, from the result or zero, up to the branch into the
    loop over the depth."""
    out = [f"  br i1 %add, label %{n}.add, label %{n}.zero", f"{n}.add:"]
    for t, (r, c) in enumerate(sums):
        out.append(f"  call void @llvm.x86.tileloadd64(i8 {t}, ptr %{n}.d{r}{c}, i64 %bytes)")
    out += [f"  br label %{n}.begin", f"{n}.zero:"]
    out += [f"  call void @llvm.x86.tilezero(i8 {t})" for t in range(len(sums))]
    return [*out, f"  br label %{n}.begin", f"{n}.begin:", f"  br label %{n}.loop"]


def _register_tiles(high: int, wide: int, columns: int) -> list[str]:
    """Tiles of `high` by `wide` over the whole depth, from one side of the result to the other: all
    pairs of a row, or the one that is left of an odd number."""
    n, pairs = f"r{high}c{wide}", columns // 32
    sums = [(r, c) for r in range(high) for c in range(wide)]
    first, before = (0, "tiles") if wide == 2 or not pairs else (32 * pairs, f"r{high}c2.more")
    out = [
        f"{n}:",
        f"  %{n}.c = phi i64 [ {first}, %{before} ], [ %{n}.c1, %{n}.stop ]",
        f"  %{n}.skip = mul i64 %{n}.c, {1024 // 16}",
        f"  %{n}.right = getelementptr i8, ptr %right, i64 %{n}.skip",
    ]
    for r, base in enumerate(("%low_dst", "%high_dst")[:high]):
        out.append(f"  %{n}.d{r}0 = getelementptr float, ptr {base}, i64 %{n}.c")
        if wide > 1:
            out.append(f"  %{n}.d{r}1 = getelementptr float, ptr %{n}.d{r}0, i64 16")
    out += [
        *begin_sums(n, sums),
        *_steps(n, high, wide, columns),
        f"  br i1 %{n}.m, label %{n}.loop, label %{n}.stop",
        f"{n}.stop:",
    ]
    for t, (r, c) in enumerate(sums):
        out.append(f"  call void @llvm.x86.tilestored64(i8 {t}, ptr %{n}.d{r}{c}, i64 %bytes)")
    out += [
        f"  %{n}.c1 = add i64 %{n}.c, {16 * wide}",
        f"  %{n}.wanted = icmp slt i64 %{n}.c1, %width",
        f"  %{n}.inside = icmp slt i64 %{n}.c1, {32 * pairs}",
        f"  %{n}.on = and i1 %{n}.wanted, %{n}.inside",
        f"  br i1 %{n}.on, label %{n}, label %{n}.more",
        f"{n}.more:",
    ]
    if wide == 2 and columns % 32:
        return [*out, f"  br i1 %{n}.wanted, label %r{high}c1, label %return"]
    return [*out, "  br label %return"]


def _steps(n: str, high: int, wide: int, columns: int) -> list[str]:
    """The loop over the depth up to its branch, which is on `m`. A block for each pair of pieces:
    LLVM takes twice as long for all in one."""
    size, last = 1024 * (columns // 16), f"{n}.end"
    out = [
        f"{n}.loop:",
        f"  %{n}.k = phi i64 [ 0, %{n}.begin ], [ %{n}.k1, %{last} ]",
        f"  %{n}.l = phi ptr [ %left, %{n}.begin ], [ %{n}.l1, %{last} ]",
        f"  %{n}.r = phi ptr [ %{n}.right, %{n}.begin ], [ %{n}.r1, %{last} ]",
    ]
    ahead = _ahead(n, high, wide, columns)
    held = (-1, -1)
    for number, (left, right) in enumerate(_PAIRS):
        out += [*_branch(n, number - 1), f"{n}.pair{number}:"]
        reads = [("l", 4 + t, 2048 * left + 1024 * t) for t in range(high) if left != held[0]]
        reads += [("r", 6 + t, size * right + 1024 * t) for t in range(wide) if right != held[1]]
        held = (left, right)
        out += _read(n, f"at{number}", reads, ahead)
        for r in range(high):
            for c in range(wide):
                to = r * wide + c
                out.append(f"  call void @llvm.x86.tdpbf16ps(i8 {to}, i8 {4 + r}, i8 {6 + c})")
                out += next(ahead)
    middle = [("l", 4 + t, 2048 + 1024 * t) for t in range(high)]
    return [
        *out,
        *_branch(n, len(_PAIRS) - 1),
        f"{n}.left:",
        f"  br i1 %left_has, label %{n}.pair4.begin, label %{n}.end",
        f"{n}.pair4.begin:",
        *_read(n, "begin", middle, ahead),
        f"  br label %{n}.pair4",
        f"{n}.end:",
        f"  %{n}.l1 = getelementptr i8, ptr %{n}.l, i64 {row_bytes(3)}",
        f"  %{n}.r1 = getelementptr i8, ptr %{n}.r, i64 {panel_bytes(columns)}",
        f"  %{n}.k1 = add i64 %{n}.k, {STEP}",
        f"  %{n}.m = icmp slt i64 %{n}.k1, %depth",
    ]


def _read(
    n: str, name: str, reads: Sequence[tuple[str, int, int]], ahead: Iterator[list[str]]
) -> list[str]:
    """Loads of tiles: of which side, into which register, and where they lie in it."""
    out = []
    for side, register, offset in reads:
        at = f"%{n}.{name}.{register}"
        out.append(f"  {at} = getelementptr i8, ptr %{n}.{side}, i64 {offset}")
        out.append(f"  call void @llvm.x86.tileloadd64(i8 {register}, ptr {at}, i64 64)")
        out += next(ahead)
    return out


def _branch(n: str, number: int) -> list[str]:
    """What follows a pair."""
    condition, then, other = _NEXT.get(number, ("", f"pair{number + 1}", ""))
    if not condition:
        return [f"  br label %{n}.{then}"]
    return [f"  br i1 %{condition}, label %{n}.{then}, label %{n}.{other}"]


def _ahead(n: str, high: int, wide: int, columns: int) -> Iterator[list[str]]:
    """Fetches of what the next step reads, and the step after it of the panel, APART at a time."""
    step, piece = panel_bytes(columns), 1024 * (columns // 16)

    def lines(side: str, begin: int, tiles: int) -> list[tuple[str, int]]:
        return [(side, begin + at) for at in range(0, 1024 * tiles, LINE)]

    each = []
    for p in range(3):
        each += lines("l", row_bytes(3) + 2048 * p, high)
        each += lines("r", step + piece * p, wide) + lines("r", 2 * step + piece * p, wide)
    numbers, places = count(), cycle(each)
    while True:
        out = []
        for _ in range(APART):
            at = f"%{n}.ahead{next(numbers)}"
            side, offset = next(places)
            out.append(f"  {at} = getelementptr i8, ptr %{n}.{side}, i64 {offset}")
            out.append(f"  call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 3, i32 1)")
        yield out
