"""Products of f32 on AMX, whose tiles multiply bf16: the micro-kernel as LLVM IR.

Each factor is cut exactly into three bf16 pieces, high, middle and low, of 8 bits each; a product
is six products of pieces, and what the other three would add is below 2^-26 of it. The sums are
kept in f32, so that the error is that of f32 products, and the rate 2.7 times theirs by the
instructions' throughput.

A block of rows and a panel are cut where they are first needed and kept in the thread's scratch: a
*cache*. What cannot be cut so that no piece or product leaves f32's normal range (an infinity, a
NaN, a number outside 2^-62 to 2^62 or, in a panel, below 2^-40; 0 can) is noted there, and is
multiplied by the micro-kernel of vectors instead.

Where the cut rows lie: for every 32 steps of the sum the three pieces, of each two tiles of 16
rows by 64 bytes; a panel's, of each piece as many tiles as it has columns by 16. The two bf16 of
4 bytes are 16 steps apart: so that no element changes its lane.

Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS; Intel 64
and IA-32 Architectures Optimization Reference Manual, chapter 20.
"""

from __future__ import annotations

from collections.abc import Sequence

ROWS, STEP = 32, 32
"""Rows of a product's tile, and steps of a sum that one instruction takes."""
ENTRIES = 24
"""Tiles of rows that a cache holds at most."""
LEAST_ROWS, LEAST_DEPTH = 16, 24
"""With fewer rows to use it for, cutting a panel takes longer than it saves; with fewer steps, most
of a tile are zeros."""
HEADER = 64 + 16 * ENTRIES
ROW_BYTES = 3 * 2 * 1024
"""Of cut rows, for every 32 steps."""
_LOW = {"rows": -62, "panel": -40}
_HIGH = 62

TEXT = """@sf.uses_tiles = internal global i32 0, align 4

declare void @sf.pieces.begin() nounwind
declare void @sf.pieces.end() nounwind

define void @sf_use_tiles(i32 %on) nounwind {
  store i32 %on, ptr @sf.uses_tiles, align 4
  ret void
}"""
"""What a module has of it that may be improved: whoever loads it says whether tiles may be used."""


def panel_bytes(columns: int) -> int:
    """Of a cut panel, for every 32 steps."""
    return 3 * columns // 16 * 1024


def symbol(columns: int) -> str:
    return f"sf.pieces.{columns}"


def is_symbol(name: str) -> bool:
    return name.startswith("sf.pieces.")


def shared_text() -> str:
    """What the micro-kernels of all widths share: a configuration of eight tiles of 16 rows of 64
    bytes, and cutting rows."""
    sizes = ", ".join(["i8 1", *["i8 0"] * 15, *["i8 64", "i8 0"] * 8, *["i8 0"] * 16])
    sizes += ", " + ", ".join(["i8 16"] * 8 + ["i8 0"] * 8)
    return f"""
@sf.pieces.tiles = internal constant [64 x i8] [{sizes}], align 64
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
declare {_FLOATS} @llvm.masked.load.v16f32.p0(ptr, <16 x i1>, {_FLOATS})
declare {_HALVES} @llvm.umin.v32i16({_HALVES}, {_HALVES})
declare {_HALVES} @llvm.umax.v32i16({_HALVES}, {_HALVES})
define void @sf.pieces.begin() {_FEATURES} {{
  call void @llvm.x86.ldtilecfg(ptr @sf.pieces.tiles)
  ret void
}}

define void @sf.pieces.end() {_FEATURES} {{
  call void @llvm.x86.tilerelease()
  ret void
}}

{_rows_text()}"""


_FEATURES = 'nounwind "target-features"="+amx-tile,+amx-bf16"'
_FLOATS, _WORDS, _HALVES = "<16 x float>", "<16 x i32>", "<32 x i16>"


def _splat(value: int, bits: int = 32) -> str:
    return f"splat (i{bits} {value})"


def _lanes(first: int) -> str:
    return "<" + ", ".join(f"i64 {first + lane}" for lane in range(16)) + ">"


def _cut(name: str, x: str, y: str, before: Seen, to: Sequence[str]) -> list[str]:
    """Stores the three pieces of two vectors; `Seen(name)` is what it has seen.

    `low` and `high` are of the high pieces' magnitudes, less one where low, so that 0 is none of
    the small ones; `rest` are all bits of what should be low pieces, of which half are 0 unless a
    number is so small that its high piece is 0.
    """
    out = []
    for v, value in (("x", x), ("y", y)):
        t, rest = f"%{name}.{v}", value
        out.append(f"  {t}0 = bitcast {_FLOATS} {value} to {_WORDS}")
        for bits, piece, left in (("0", "h", "1"), ("1", "m", "l")):
            out += [
                f"  {t}{piece}.up = add {_WORDS} {t}{bits}, {_splat(0x8000)}",
                f"  {t}{piece} = and {_WORDS} {t}{piece}.up, {_splat(-65536)}",
                f"  {t}{piece}.f = bitcast {_WORDS} {t}{piece} to {_FLOATS}",
                f"  {t}{piece}.rest = fsub {_FLOATS} {rest}, {t}{piece}.f",
                f"  {t}{left} = bitcast {_FLOATS} {t}{piece}.rest to {_WORDS}",
            ]
            rest = f"{t}{piece}.rest"
    for piece, place in zip("hml", to, strict=True):
        out += [
            f"  %{name}.{piece}0 = lshr {_WORDS} %{name}.x{piece}, {_splat(16)}",
            f"  %{name}.{piece}1 = and {_WORDS} %{name}.y{piece}, {_splat(-65536)}",
            f"  %{name}.{piece}2 = or {_WORDS} %{name}.{piece}0, %{name}.{piece}1",
            f"  store {_WORDS} %{name}.{piece}2, ptr {place}, align 64",
        ]
    return [
        *out,
        f"  %{name}.seen = bitcast {_WORDS} %{name}.h2 to {_HALVES}",
        f"  %{name}.abs = and {_HALVES} %{name}.seen, {_splat(0x7FFF, 16)}",
        f"  %{name}.less = add {_HALVES} %{name}.abs, {_splat(-1, 16)}",
        f"  %{name}.low = call {_HALVES} @llvm.umin.v32i16({_HALVES} {before.low},"
        f" {_HALVES} %{name}.less)",
        f"  %{name}.high = call {_HALVES} @llvm.umax.v32i16({_HALVES} {before.high},"
        f" {_HALVES} %{name}.abs)",
        f"  %{name}.bits = or {_WORDS} %{name}.xl, %{name}.yl",
        f"  %{name}.rest = or {_WORDS} {before.rest}, %{name}.bits",
    ]


class Seen:
    """The values in which cutting keeps what it has seen, see `_cut`."""

    def __init__(self, name: str) -> None:
        self.low, self.high, self.rest = (f"%{name}.{x}" for x in ("low", "high", "rest"))

    def phis(self, start: str, entry: Seen | None, latch: str, last: Seen) -> list[str]:
        """The same of a loop that comes from `start`, with nothing seen there unless given."""
        none = (_splat(-1, 16), "zeroinitializer", "zeroinitializer")
        first = none if entry is None else (entry.low, entry.high, entry.rest)
        kinds = (_HALVES, _HALVES, _WORDS)
        mine, ends = (self.low, self.high, self.rest), (last.low, last.high, last.rest)
        return [
            f"  {name} = phi {kind} [ {begin}, %{start} ], [ {end}, %{latch} ]"
            for name, kind, begin, end in zip(mine, kinds, first, ends, strict=True)
        ]

    def verdict(self, kind: str) -> list[str]:
        """Returns whether anything seen is out of range."""
        least, most = ((127 + _LOW[kind]) << 7) - 1, (127 + _HIGH) << 7
        return [
            f"  %small = icmp ult {_HALVES} {self.low}, {_splat(least, 16)}",
            f"  %large = icmp uge {_HALVES} {self.high}, {_splat(most, 16)}",
            f"  %inexact.words = and {_WORDS} {self.rest}, {_splat(0xFFFF)}",
            f"  %inexact.halves = bitcast {_WORDS} %inexact.words to {_HALVES}",
            f"  %inexact = icmp ne {_HALVES} %inexact.halves, zeroinitializer",
            "  %either = or <32 x i1> %small, %large",
            "  %any = or <32 x i1> %either, %inexact",
            "  %bits = bitcast <32 x i1> %any to i32",
            "  %bad = icmp ne i32 %bits, 0",
            "  ret i1 %bad",
        ]


def _spread(name: str, value: str) -> list[str]:
    return [
        f"  %{name}.in = insertelement <16 x i64> poison, i64 {value}, i64 0",
        f"  %{name} = shufflevector <16 x i64> %{name}.in, <16 x i64> poison,"
        " <16 x i32> zeroinitializer",
    ]


def _load(name: str, at: str, mask: str) -> str:
    return (
        f"  %{name} = call {_FLOATS} @llvm.masked.load.v16f32.p0(ptr align 4 {at},"
        f" <16 x i1> {mask}, {_FLOATS} zeroinitializer)"
    )


def _rows_text() -> str:
    """`sf.pieces.rows(a, a_row, rows, depth, to)`: cuts rows, with zeros up to 16 or 32 of them and
    up to a multiple of 32 steps. Whether they are out of range."""
    cut, before, inside = Seen("c"), Seen("row"), Seen("step")
    return "\n".join(
        [
            "define internal i1 @sf.pieces.rows(ptr %a, i64 %a_row, i64 %rows, i64 %depth, ptr %to)"
            " nounwind {",
            "entry:",
            "  %up = add i64 %rows, 15",
            "  %all = and i64 %up, -16",
            "  br label %row",
            "row:",
            "  %r = phi i64 [ 0, %entry ], [ %r1, %rowed ]",
            *before.phis("entry", None, "rowed", cut),
            "  %is = icmp slt i64 %r, %rows",
            "  %limit = select i1 %is, i64 %depth, i64 0",
            "  %from = select i1 %is, i64 %r, i64 0",
            "  %skip = mul i64 %from, %a_row",
            "  %base = getelementptr float, ptr %a, i64 %skip",
            "  %half = lshr i64 %r, 4",
            "  %in = and i64 %r, 15",
            "  %o1 = shl i64 %half, 10",
            "  %o2 = shl i64 %in, 6",
            "  %o = add i64 %o1, %o2",
            "  %out = getelementptr i8, ptr %to, i64 %o",
            "  br label %step",
            "step:",
            "  %k = phi i64 [ 0, %row ], [ %k1, %step ]",
            "  %p0 = phi ptr [ %out, %row ], [ %next, %step ]",
            *inside.phis("row", before, "step", cut),
            "  %left = sub i64 %limit, %k",
            *_spread("lefts", "%left"),
            f"  %m0 = icmp sgt <16 x i64> %lefts, {_lanes(0)}",
            f"  %m1 = icmp sgt <16 x i64> %lefts, {_lanes(16)}",
            "  %at = getelementptr float, ptr %base, i64 %k",
            "  %at1 = getelementptr float, ptr %at, i64 16",
            _load("x", "%at", "%m0"),
            _load("y", "%at1", "%m1"),
            "  %p1 = getelementptr i8, ptr %p0, i64 2048",
            "  %p2 = getelementptr i8, ptr %p0, i64 4096",
            *_cut("c", "%x", "%y", inside, ("%p0", "%p1", "%p2")),
            f"  %next = getelementptr i8, ptr %p0, i64 {ROW_BYTES}",
            f"  %k1 = add i64 %k, {STEP}",
            "  %more = icmp slt i64 %k1, %depth",
            "  br i1 %more, label %step, label %rowed",
            "rowed:",
            "  %r1 = add i64 %r, 1",
            "  %again = icmp slt i64 %r1, %all",
            "  br i1 %again, label %row, label %done",
            "done:",
            *cut.verdict("rows"),
            "}",
        ]
    )


def _panel_text(columns: int) -> list[str]:
    """`sf.pieces.panel.N(panel, depth, to)`: cuts a panel, with zeros up to a multiple of 32 steps.
    Whether it is out of range."""
    tiles = columns // 16
    body: list[str] = []
    before = seen = Seen("row")
    for c in range(tiles):
        body += [
            f"  %x{c}.at = getelementptr float, ptr %a0, i64 {16 * c}",
            f"  %y{c}.at = getelementptr float, ptr %a1, i64 {16 * c}",
            _load(f"x{c}", f"%x{c}.at", "%m0"),
            _load(f"y{c}", f"%y{c}.at", "%m1"),
        ]
        for piece in range(3):
            place = 1024 * (piece * tiles + c)
            body.append(f"  %p{c}.{piece} = getelementptr i8, ptr %out, i64 {place}")
        places = [f"%p{c}.{piece}" for piece in range(3)]
        body += _cut(f"c{c}", f"%x{c}", f"%y{c}", seen, places)
        seen = Seen(f"c{c}")
    return [
        f"define internal i1 @sf.pieces.panel.{columns}(ptr %panel, i64 %depth, ptr %to) nounwind"
        " {",
        "entry:",
        "  br label %row",
        "row:",
        "  %i = phi i64 [ 0, %entry ], [ %i1, %row ]",
        *before.phis("entry", None, "row", seen),
        "  %in = and i64 %i, 15",
        "  %step = lshr i64 %i, 4",
        "  %first = shl i64 %step, 5",
        "  %k0 = add i64 %first, %in",
        "  %k1 = add i64 %k0, 16",
        "  %is0 = icmp slt i64 %k0, %depth",
        "  %is1 = icmp slt i64 %k1, %depth",
        "  %m0.in = insertelement <16 x i1> poison, i1 %is0, i64 0",
        "  %m0 = shufflevector <16 x i1> %m0.in, <16 x i1> poison, <16 x i32> zeroinitializer",
        "  %m1.in = insertelement <16 x i1> poison, i1 %is1, i64 0",
        "  %m1 = shufflevector <16 x i1> %m1.in, <16 x i1> poison, <16 x i32> zeroinitializer",
        f"  %s0 = mul i64 %k0, {columns}",
        "  %a0 = getelementptr float, ptr %panel, i64 %s0",
        f"  %a1 = getelementptr float, ptr %a0, i64 {16 * columns}",
        f"  %o0 = mul i64 %step, {panel_bytes(columns)}",
        "  %o1 = shl i64 %in, 6",
        "  %o = add i64 %o0, %o1",
        "  %out = getelementptr i8, ptr %to, i64 %o",
        *body,
        "  %i1 = add i64 %i, 1",
        "  %next = lshr i64 %i1, 4",
        "  %following = shl i64 %next, 5",
        "  %more = icmp slt i64 %following, %depth",
        "  br i1 %more, label %row, label %done",
        "done:",
        *seen.verdict("panel"),
        "}",
    ]


def tile_text(columns: int, vectors: str) -> str:
    """The function `symbol(dst, dst_row, a, a_row, panel, rows, depth, width, add, cache, entries,
    most)`: as `tile.tile_text`'s, for a packed panel and at most 32 rows, all 32 of which are
    dst's to overwrite.

    `cache` is null where tiles may not be used; it holds `entries` tiles of rows and a panel, of at
    most `most` steps, a multiple of 32. `vectors`: the micro-kernel for what it does not take.
    """
    return "\n".join([*_tile(columns, vectors), "", *_panel_text(columns)])


def _tile(columns: int, vectors: str) -> list[str]:
    out = [
        f"define void @{symbol(columns)}(ptr noalias %dst, i64 %dst_row, ptr readonly %a,"
        " i64 %a_row, ptr readonly %panel, i64 %rows, i64 %depth, i64 %width, i1 %add,"
        " ptr %cache, i64 %entries, i64 %most) noinline noduplicate"
        f" {_FEATURES} {{",
        "entry:",
        "  %off = icmp eq ptr %cache, null",
        f"  %few = icmp slt i64 %rows, {LEAST_ROWS}",
        f"  %short = icmp slt i64 %depth, {LEAST_DEPTH}",
        "  %small = or i1 %few, %short",
        "  %not = or i1 %off, %small",
        "  br i1 %not, label %vectors, label %look",
        "vectors:",
        f"  call void @{vectors}(ptr %dst, i64 %dst_row, ptr %a, i64 %a_row, i64 1, ptr %panel,"
        " i64 0, ptr null, i64 %rows, i64 %depth, i64 %width, i1 %add)",
        "  ret void",
        *_rows_at_hand(),
        *_panel_at_hand(columns),
        "multiply:",
        "  %bad = or i64 %bad_rows, %bad_panel",
        "  %fine = icmp eq i64 %bad, 0",
        "  br i1 %fine, label %tiles, label %vectors",
        "tiles:",
        "  %bytes = shl i64 %dst_row, 2",
        "  %low_dst = getelementptr i8, ptr %dst, i64 0",
        "  %sixteen = shl i64 %bytes, 4",
        "  %high_dst = getelementptr i8, ptr %dst, i64 %sixteen",
        "  %two = icmp sgt i64 %rows, 16",
        "  br i1 %two, label %r2c0, label %r1c0",
    ]
    for high in (2, 1):
        for first in range(0, columns // 16, 2):
            wide = min(2, columns // 16 - first)
            last = first + wide >= columns // 16
            out += _register_tile(high, first, wide, columns, last)
    return [*out, "return:", "  ret void", "}"]


def _rows_at_hand() -> list[str]:
    """Finds the cut rows in the cache, or cuts them into its place that was filled longest ago."""
    return [
        "look:",
        "  %key = ptrtoint ptr %a to i64",
        "  %keys = getelementptr i8, ptr %cache, i64 64",
        f"  %flags = getelementptr i8, ptr %cache, i64 {64 + 8 * ENTRIES}",
        f"  %entry_bytes = mul i64 %most, {ROW_BYTES // STEP}",
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
        "  %cut_bad = call i1 @sf.pieces.rows(ptr %a, i64 %a_row, i64 %rows, i64 %depth,"
        " ptr %cut_to)",
        "  %cut_flag = zext i1 %cut_bad to i64",
        "  %cut_key = getelementptr i64, ptr %keys, i64 %turn",
        "  store i64 %key, ptr %cut_key, align 8",
        "  %cut_flag_at = getelementptr i64, ptr %flags, i64 %turn",
        "  store i64 %cut_flag, ptr %cut_flag_at, align 8",
        "  br label %have",
        "have:",
        "  %n = phi i64 [ %e, %search ], [ %turn, %cut ]",
        "  %skip = mul i64 %n, %entry_bytes",
        "  %left = getelementptr i8, ptr %room, i64 %skip",
        "  %flag_at = getelementptr i64, ptr %flags, i64 %n",
        "  %bad_rows = load i64, ptr %flag_at, align 8",
    ]


def _panel_at_hand(columns: int) -> list[str]:
    """Cuts the panel unless it is the last one that was."""
    return [
        "  %behind = mul i64 %entries, %entry_bytes",
        "  %right = getelementptr i8, ptr %room, i64 %behind",
        "  %panel_key_at = getelementptr i8, ptr %cache, i64 8",
        "  %panel_flag_at = getelementptr i8, ptr %cache, i64 16",
        "  %panel_key = ptrtoint ptr %panel to i64",
        "  %panel_there = load i64, ptr %panel_key_at, align 8",
        "  %panel_found = icmp eq i64 %panel_there, %panel_key",
        "  br i1 %panel_found, label %panel_have, label %panel_cut",
        "panel_cut:",
        f"  %panel_is_bad = call i1 @sf.pieces.panel.{columns}(ptr %panel, i64 %depth,"
        " ptr %right)",
        "  %panel_flag = zext i1 %panel_is_bad to i64",
        "  store i64 %panel_key, ptr %panel_key_at, align 8",
        "  store i64 %panel_flag, ptr %panel_flag_at, align 8",
        "  br label %panel_have",
        "panel_have:",
        "  %bad_panel = load i64, ptr %panel_flag_at, align 8",
        "  br label %multiply",
    ]


_PAIRS = ((2, 0), (0, 0), (0, 2), (0, 1), (1, 1), (1, 0))
"""Pieces that are multiplied (0 high, 1 middle, 2 low), so that one of two stays for the next."""


def _register_tile(high: int, first: int, wide: int, columns: int, last: bool) -> list[str]:
    """`high` by `wide` tiles of the result, from the tile `first` across, over the whole depth."""
    n, tiles = f"r{high}c{first}", columns // 16
    following = "return" if last else f"r{high}c{first + 2}"
    sums = [(r, c) for r in range(high) for c in range(wide)]
    out = [f"{n}:"]
    for r, c in sums:
        base = ("%low_dst", "%high_dst")[r]
        out.append(f"  %{n}.d{r}{c} = getelementptr float, ptr {base}, i64 {16 * (first + c)}")
    out += [f"  br i1 %add, label %{n}.add, label %{n}.zero", f"{n}.add:"]
    for t, (r, c) in enumerate(sums):
        out.append(
            f"  call void @llvm.x86.tileloadd64(i8 {t}, ptr %{n}.d{r}{c}, i64 %bytes)"
        )
    out += [f"  br label %{n}.begin", f"{n}.zero:"]
    out += [f"  call void @llvm.x86.tilezero(i8 {t})" for t in range(len(sums))]
    out += [
        f"  br label %{n}.begin",
        f"{n}.begin:",
        f"  %{n}.right = getelementptr i8, ptr %right, i64 {1024 * first}",
        f"  br label %{n}.loop",
        f"{n}.loop:",
        f"  %{n}.k = phi i64 [ 0, %{n}.begin ], [ %{n}.k1, %{n}.loop ]",
        f"  %{n}.l = phi ptr [ %left, %{n}.begin ], [ %{n}.l1, %{n}.loop ]",
        f"  %{n}.r = phi ptr [ %{n}.right, %{n}.begin ], [ %{n}.r1, %{n}.loop ]",
    ]
    held = (-1, -1)
    for number, pair in enumerate(_PAIRS):
        sides = (("l", high, 4, 2048, pair[0]), ("r", wide, 6, 1024 * tiles, pair[1]))
        for which, (side, count, register, size, piece) in enumerate(sides):
            if held[which] == piece:
                continue
            for t in range(count):
                at = f"%{n}.{side}{number}.{t}"
                out.append(
                    f"  {at} = getelementptr i8, ptr %{n}.{side}, i64 {size * piece + 1024 * t}"
                )
                out.append(
                    f"  call void @llvm.x86.tileloadd64(i8 {register + t}, ptr {at}, i64 64)"
                )
        held = pair
        for t, (r, c) in enumerate(sums):
            out.append(f"  call void @llvm.x86.tdpbf16ps(i8 {t}, i8 {4 + r}, i8 {6 + c})")
    out += [
        f"  %{n}.l1 = getelementptr i8, ptr %{n}.l, i64 {ROW_BYTES}",
        f"  %{n}.r1 = getelementptr i8, ptr %{n}.r, i64 {panel_bytes(columns)}",
        f"  %{n}.k1 = add i64 %{n}.k, {STEP}",
        f"  %{n}.m = icmp slt i64 %{n}.k1, %depth",
        f"  br i1 %{n}.m, label %{n}.loop, label %{n}.stop",
        f"{n}.stop:",
    ]
    for t, (r, c) in enumerate(sums):
        out.append(
            f"  call void @llvm.x86.tilestored64(i8 {t}, ptr %{n}.d{r}{c}, i64 %bytes)"
        )
    if last:
        return [*out, "  br label %return"]
    out.append(f"  %{n}.wanted = icmp sgt i64 %width, {16 * (first + wide)}")
    return [*out, f"  br i1 %{n}.wanted, label %{following}, label %return"]
