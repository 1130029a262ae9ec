"""Products of 8-bit integers, exact in i32: the micro-kernel as LLVM IR.

A panel is put in order for the unit at hand a stretch of the depth at a time, and multiplied by all
rows before the next one. The units are AMX, for any signs; AVX-512 VNNI, whose `vpdpbusd` takes an
unsigned factor and a signed one, so that with two of a kind the rows' highest bits are flipped, and
what that adds, 128 of each column's sum, is taken away again; and multiplications of pairs of 16
bits, with AVX2 or without VNNI.

Sums wrap as i32 does, in whatever order they are made.

Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSSD and
VPDPBUSD.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.plan import UNITS
from stagefuse.dsl.frozen import frozen

from .byte_lines import STEP, ZEROS, lines_symbol, lines_text, loop, panel_symbol, panel_text
from .pieces import begin_sums
from .tile import tile_text
from .tile_sums import QUADS, TileShape

SLAB = 32
"""Rows that are put in order at a time: two tiles of AMX."""
DEPTH = 1024
"""Of a stretch, in bytes of a line: those of a slab and of a panel fit the second-level cache."""
LEAST_ROWS = 16
"""With fewer, most of a tile of AMX is empty."""
_AMX = '"target-features"="+amx-tile,+amx-int8"'


@frozen
class ByteProduct:
    """A micro-kernel: whether the rows' integers and the panel's are signed ("s" or "u"), columns
    of the panel and how its rows lie, as in `tile.TileShape`."""

    left: str
    right: str
    columns: int
    rows: str = "packed"

    @property
    def symbol(self) -> str:
        return f"sf.bytes.{self.left}{self.right}.{self.columns}.{self.rows}"

    @property
    def flips(self) -> bool:
        """Whether VNNI takes the rows with their highest bits flipped."""
        return self.left == self.right

    @property
    def pairs(self) -> TileShape:
        """The micro-kernel of pairs."""
        return TileShape("i32", self.columns, unit="pairs")

    @property
    def quads(self) -> TileShape:
        """That of VNNI; rows that are flipped have the sign that the panel has not."""
        unit = "quads.us" if self.right == "s" else "quads.su"
        return TileShape("i32", self.columns, unit=unit)

    def texts(self, level: str) -> dict[str, str]:
        """The functions that it is made of, by name. Its own is `symbol(dst, dst_row, a, a_row,
        panel, step, places, rows, depth, width, add, room, units)`: as `tile.tile_text`'s, for
        bytes and an i32 dst, of which all columns are there to be overwritten; `units` are bits of
        `plan.UNITS`."""
        kind, columns = f"pairs.{self.right}", self.columns
        found = {
            self.symbol: _driver(self, level),
            panel_symbol(kind, columns, self.rows): panel_text(kind, columns, self.rows),
            self.pairs.symbol: tile_text(self.pairs, level),
        }
        if level == "v4":
            found[panel_symbol("quads", columns, self.rows)] = panel_text(
                "quads", columns, self.rows
            )
            found[self.quads.symbol] = tile_text(self.quads, level)
            found[_amx_symbol(self)] = _amx(self)
            found[_kept_symbol(columns)] = _kept(columns)
            if self.flips:
                found[_shift_symbol(self)] = _shift(self)
                found[_moved_symbol(columns)] = _moved(columns)
        return found


def room(columns: int) -> int:
    """Bytes of scratch that it needs: lines, a panel, its shifts, ends of rows, and the sums of a
    slab."""
    return SLAB * DEPTH + columns * DEPTH + 4 * 64 + 4 * 64 + 4 * SLAB * columns


def is_symbol(name: str) -> bool:
    return name.startswith("sf.bytes.")


def shared_text(level: str) -> str:
    """What the micro-kernels of all panels share."""
    kinds = ("wide.s", "wide.u", *(("plain", "flipped") if level == "v4" else ()))
    return "\n\n".join([ZEROS, *map(lines_text, kinds)])


def _driver(p: ByteProduct, level: str) -> str:
    """The whole of a product by a panel: stretches of the depth, and slabs of rows."""
    return "\n".join([
        f"define void @{p.symbol}(ptr noalias %dst, i64 %dst_row, ptr readonly %a, i64 %a_row,"
        " ptr readonly %panel, i64 %step, ptr readonly %places, i64 %rows, i64 %depth, i64 %width,"
        " i1 %add, ptr noalias %room, i32 %units) noinline noduplicate nounwind {",
        "entry:",
        f"  %right = getelementptr i8, ptr %room, i64 {SLAB * DEPTH}",
        f"  %shift = getelementptr i8, ptr %right, i64 {p.columns * DEPTH}",
        "  %spare = getelementptr i8, ptr %shift, i64 256",
        "  %sums = getelementptr i8, ptr %spare, i64 256",
        f"  %has_tiles = and i32 %units, {UNITS['tiles']}",
        f"  %has_quads = and i32 %units, {UNITS['quads']}",
        "  %tiles_on = icmp ne i32 %has_tiles, 0",
        "  %quads_on = icmp ne i32 %has_quads, 0",
        f"  %enough = icmp sge i64 %rows, {LEAST_ROWS}",
        "  %tiled = and i1 %tiles_on, %enough",
        f"  %narrow = or i1 %tiled, {'%quads_on' if level == 'v4' else 'false'}",
        f"  %most = select i1 %narrow, i64 {DEPTH}, i64 {DEPTH // 2}",
        "  br label %stretch",
        "stretch:",
        "  %begin = phi i64 [ 0, %entry ], [ %end, %stretch_done ]",
        *_panel_in_order(p, level),
        *loop("r", "slabs", "%rows", SLAB, _slab(p, level), "stretch_done"),
        "stretch_done:",
        "  %end = add i64 %begin, %most",
        "  %more = icmp slt i64 %end, %depth",
        "  br i1 %more, label %stretch, label %return",
        "return:",
        "  ret void",
        "}",
    ])  # fmt: skip


def _panel_in_order(p: ByteProduct, level: str) -> list[str]:
    """Puts the stretch of the panel from `begin` on in order."""

    def ordered(kind: str) -> str:
        return (
            f"  call void @{panel_symbol(kind, p.columns, p.rows)}(ptr %first, i64 %step,"
            " ptr %table, i64 %length, i64 %padded, i64 %width, ptr %right, ptr %spare)"
        )

    placed = p.rows == "places"
    row = "0" if placed else str(p.columns) if p.rows == "packed" else "%step"
    out = [
        "  %behind = sub i64 %depth, %begin",
        "  %part = icmp slt i64 %behind, %most",
        "  %length = select i1 %part, i64 %behind, i64 %most",
        f"  %up = add i64 %length, {STEP - 1}",
        f"  %padded = and i64 %up, {-STEP}",
        "  %groups = ashr i64 %padded, 2",
        "  %halves = ashr i64 %padded, 1",
        "  %later = icmp sgt i64 %begin, 0",
        "  %adds = or i1 %add, %later",
        f"  %skip = mul i64 %begin, {row}",
        "  %first = getelementptr i8, ptr %panel, i64 %skip",
        f"  %table = getelementptr i64, ptr %places, i64 {'%begin' if placed else '0'}",
        "  %some = icmp sgt i64 %length, 0",
        "  br i1 %some, label %order, label %slabs",
        "order:",
    ]
    if level == "v4":
        out += [
            "  br i1 %narrow, label %order_quads, label %order_pairs",
            "order_quads:",
            ordered("quads"),
        ]
        if p.flips:
            out.append(
                f"  call void @{_shift_symbol(p)}(ptr %right, i64 %groups, ptr %shift, i1 %tiled)"
            )
        out += ["  br label %slabs", "order_pairs:"]
    return [*out, ordered(f"pairs.{p.right}"), "  br label %slabs", "slabs:", "  br label %r.do"]


def _lined(kind: str, start: str = "%from", length: str = "%length", row: int = DEPTH) -> str:
    """Puts a slab's rows in order."""
    return (
        f"  call void @{lines_symbol(kind)}(ptr {start}, i64 %a_row, i64 %high, i64 {length},"
        f" ptr %room, i64 {row}, ptr %spare)"
    )


def _multiplied(
    shape: TileShape, steps: str, lines: str = "%room", row: str = f"{DEPTH // 4}"
) -> str:
    """Multiplies the lines of a slab by the panel."""
    return (
        f"  call void @{shape.symbol}(ptr %to, i64 %dst_row, ptr {lines}, i64 {row}, i64 1,"
        f" ptr %right, i64 0, ptr null, i64 %high, i64 {steps}, i64 %width, i1 %adds)"
    )


def _slab(p: ByteProduct, level: str) -> list[str]:
    """The product of the slab from row `r` on by a stretch of the panel."""
    out = [
        "  %rest = sub i64 %rows, %r",
        f"  %less = icmp slt i64 %rest, {SLAB}",
        f"  %high = select i1 %less, i64 %rest, i64 {SLAB}",
        "  %from_skip = mul i64 %r, %a_row",
        "  %from_at = add i64 %from_skip, %begin",
        "  %from = getelementptr i8, ptr %a, i64 %from_at",
        "  %to_skip = mul i64 %r, %dst_row",
        "  %to = getelementptr i32, ptr %dst, i64 %to_skip",
        f"  br i1 %some, label %{'choose' if level == 'v4' else 'by_pairs'}, label %by_none",
        "by_none:",  # sums of nothing
        _multiplied(p.pairs, "0"),
        "  br label %slab_done",
    ]
    if level == "v4":
        out += [
            "choose:",
            "  br i1 %narrow, label %by_bytes, label %by_pairs",
            "by_bytes:",
            "  br i1 %tiled, label %by_tiles, label %by_quads",
            *_by_quads(p),
            *_by_tiles(p),
        ]
    return [
        *out,
        "by_pairs:",
        _lined(f"wide.{p.left}"),
        _multiplied(p.pairs, "%halves"),
        "  br label %slab_done",
        "slab_done:",
    ]


def _by_quads(p: ByteProduct) -> list[str]:
    """A slab by VNNI: rows where they lie, if they are of whole groups of four and not flipped."""
    if p.flips:
        moved = _moved_symbol(p.columns)
        return [
            "by_quads:",
            _lined("flipped"),
            _multiplied(p.quads, "%groups"),
            f"  call void @{moved}(ptr %to, i64 %dst_row, i64 %high, ptr %shift)",
            "  br label %slab_done",
        ]
    return [
        "by_quads:",
        "  %both = or i64 %a_row, %length",
        "  %odd = and i64 %both, 3",
        "  %fours = icmp eq i64 %odd, 0",
        "  br i1 %fours, label %by_rows, label %by_lines",
        "by_rows:",
        "  %a_quads = ashr i64 %a_row, 2",
        "  %steps = ashr i64 %length, 2",
        _multiplied(p.quads, "%steps", "%from", "%a_quads"),
        "  br label %slab_done",
        "by_lines:",
        _lined("plain"),
        _multiplied(p.quads, "%groups"),
        "  br label %slab_done",
    ]


# AMX


def _by_tiles(p: ByteProduct) -> list[str]:
    """A slab by tiles: rows where they lie, but for the end of each; all of fewer rows copied, and
    the sums of those too, since tiles are stored whole."""
    call = f"  call void @{_amx_symbol(p)}"
    return [
        "by_tiles:",
        "  br i1 %less, label %copy_all, label %in_place",
        "copy_all:",
        _lined("plain"),
        f"{call}(ptr %sums, i64 {p.columns}, ptr %room, i64 {DEPTH}, i64 %padded, ptr %room,"
        " i64 %padded, ptr %right, i64 %high, i1 false)",
        f"  call void @{_kept_symbol(p.columns)}(ptr %to, i64 %dst_row, i64 %high, ptr %sums,"
        " i1 %adds)",
        "  br label %slab_done",
        "in_place:",
        f"  %whole = and i64 %length, {-STEP}",
        "  %over = sub i64 %length, %whole",
        "  %ends = icmp sgt i64 %over, 0",
        "  br i1 %ends, label %copy_ends, label %ready",
        "copy_ends:",
        "  %ends_from = getelementptr i8, ptr %from, i64 %whole",
        _lined("plain", "%ends_from", "%over", STEP),
        "  br label %ready",
        "ready:",
        f"{call}(ptr %to, i64 %dst_row, ptr %from, i64 %a_row, i64 %whole, ptr %room,"
        " i64 %padded, ptr %right, i64 %high, i1 %adds)",
        "  br label %slab_done",
    ]


def _amx_symbol(p: ByteProduct) -> str:
    return f"sf.bytes.amx.{p.left}{p.right}.{p.columns}"


def _amx(p: ByteProduct) -> str:
    """The function `symbol(to, to_row, a, a_row, whole, ends, padded, right, rows, add)`: lines of
    `padded` bytes, from `whole` on those of `ends`."""
    out = [
        f"define void @{_amx_symbol(p)}(ptr noalias %to, i64 %to_row,"
        " ptr readonly %a, i64 %a_row, i64 %whole, ptr readonly %ends, i64 %padded,"
        f" ptr readonly %right, i64 %rows, i1 %add) noinline noduplicate nounwind {_AMX} {{",
        "entry:",
        "  %bytes = shl i64 %to_row, 2",
        "  %sixteen = shl i64 %bytes, 4",
        "  %d0 = getelementptr i8, ptr %to, i64 0",
        "  %d1 = getelementptr i8, ptr %to, i64 %sixteen",
        "  %two = icmp sgt i64 %rows, 16",
        "  br i1 %two, label %r2c0, label %r1c0",
    ]
    for high in (2, 1):
        for first in range(0, p.columns, 32):
            after = f"r{high}c{first + 32}" if first + 32 < p.columns else "return"
            out += _tile(f"r{high}c{first}", high, first, p.columns, p.left + p.right, after)
    return "\n".join([*out, "return:", "  ret void", "}"])


def _tile(n: str, high: int, first: int, columns: int, signs: str, after: str) -> list[str]:
    """Up to two tiles down and two across, from a column on, over the whole depth."""
    wide = min(2, (columns - first) // 16)
    sums = [(r, c) for r in range(high) for c in range(wide)]
    out = [f"{n}:"]
    for r, c in sums:
        out.append(f"  %{n}.d{r}{c} = getelementptr i32, ptr %d{r}, i64 {first + 16 * c}")
    out += [
        *begin_sums(n, sums),
        f"{n}.loop:",
        f"  %{n}.k = phi i64 [ 0, %{n}.begin ], [ %{n}.k1, %{n}.loop ]",
        f"  %{n}.in = icmp slt i64 %{n}.k, %whole",
        f"  %{n}.at = getelementptr i8, ptr %a, i64 %{n}.k",
        f"  %{n}.a0 = select i1 %{n}.in, ptr %{n}.at, ptr %ends",
        f"  %{n}.row = select i1 %{n}.in, i64 %a_row, i64 {STEP}",
        f"  %{n}.down = shl i64 %{n}.row, 4",
        f"  %{n}.a1 = getelementptr i8, ptr %{n}.a0, i64 %{n}.down",
        f"  %{n}.skip = mul i64 %{n}.k, {columns}",
        f"  %{n}.line = getelementptr i8, ptr %right, i64 %{n}.skip",
    ]
    for r in range(high):
        out.append(f"  call void @llvm.x86.tileloadd64(i8 {4 + r}, ptr %{n}.a{r}, i64 %{n}.row)")
    for c in range(wide):
        out += [
            f"  %{n}.b{c} = getelementptr i8, ptr %{n}.line, i64 {4 * (first + 16 * c)}",
            f"  call void @llvm.x86.tileloadd64(i8 {6 + c}, ptr %{n}.b{c}, i64 {4 * columns})",
        ]
    for t, (r, c) in enumerate(sums):
        out.append(f"  call void @llvm.x86.tdpb{signs}d(i8 {t}, i8 {4 + r}, i8 {6 + c})")
    out += [
        f"  %{n}.k1 = add i64 %{n}.k, {STEP}",
        f"  %{n}.m = icmp slt i64 %{n}.k1, %padded",
        f"  br i1 %{n}.m, label %{n}.loop, label %{n}.stop",
        f"{n}.stop:",
    ]
    for t, (r, c) in enumerate(sums):
        out.append(f"  call void @llvm.x86.tilestored64(i8 {t}, ptr %{n}.d{r}{c}, i64 %bytes)")
    return [*out, f"  br label %{after}"]


# What flipped bits add


def _shift_symbol(p: ByteProduct) -> str:
    return f"sf.bytes.shift.{p.right}.{p.columns}"


def _shift(p: ByteProduct) -> str:
    """The function `symbol(panel, groups, shift, skip)`: 128 times the sum of each column, which is
    to be taken away (signed) or added."""
    right, columns = p.right, p.columns
    vectors, kind, small = range(columns // 16), "<16 x i32>", "<64 x i8>"
    body: list[str] = []
    before: list[str] = []
    for v in vectors:
        x, y = ("splat (i8 1)", f"%x{v}") if right == "s" else (f"%x{v}", "splat (i8 1)")
        before.append(f"  %s{v} = phi {kind} [ zeroinitializer, %entry ], [ %n{v}, %k.latch ]")
        body += [
            f"  %p{v} = getelementptr i8, ptr %row, i64 {64 * v}",
            f"  %x{v} = load {small}, ptr %p{v}, align 1",
            f"  %n{v} = call {kind} @{QUADS[16]}({kind} %s{v}, {small} {x}, {small} {y})",
        ]
    steps = loop("k", "entry", "%groups", 1, [
        *before,
        f"  %skip_to = mul i64 %k, {4 * columns}",
        "  %row = getelementptr i8, ptr %panel, i64 %skip_to",
        *body,
    ], "store")  # fmt: skip
    stores: list[str] = []
    for v in vectors:
        stores += [
            f"  %m{v} = mul {kind} %n{v}, splat (i32 {-128 if right == 's' else 128})",
            f"  %q{v} = getelementptr i32, ptr %shift, i64 {16 * v}",
            f"  store {kind} %m{v}, ptr %q{v}, align 4",
        ]
    return "\n".join([
        f"define void @{_shift_symbol(p)}(ptr readonly %panel, i64 %groups,"
        ' ptr %shift, i1 %skip) noinline nounwind "target-features"="+avx512vnni" {',
        "entry:",
        "  br i1 %skip, label %return, label %k.do",
        *steps,
        "store:",
        *stores,
        "  br label %return",
        "return:",
        "  ret void",
        "}",
    ])  # fmt: skip


def _kept_symbol(columns: int) -> str:
    return f"sf.bytes.kept.{columns}"


def _kept(columns: int) -> str:
    """The function `symbol(to, to_row, rows, sums, add)`, which stores sums, or adds them."""
    kind = "<16 x i32>"
    body = [
        f"  %from_skip = mul i64 %r, {columns}",
        "  %from = getelementptr i32, ptr %sums, i64 %from_skip",
    ]
    for v in range(columns // 16):
        body += [
            f"  %p{v} = getelementptr i32, ptr %row, i64 {16 * v}",
            f"  %q{v} = getelementptr i32, ptr %from, i64 {16 * v}",
            f"  %x{v} = load {kind}, ptr %q{v}, align 4",
            f"  %w{v} = load {kind}, ptr %p{v}, align 4",
            f"  %o{v} = select i1 %add, {kind} %w{v}, {kind} zeroinitializer",
            f"  %y{v} = add {kind} %x{v}, %o{v}",
            f"  store {kind} %y{v}, ptr %p{v}, align 4",
        ]
    return _rows_changed(_kept_symbol(columns), "ptr readonly %sums, i1 %add", [], body)


def _moved_symbol(columns: int) -> str:
    return f"sf.bytes.moved.{columns}"


def _moved(columns: int) -> str:
    """The function `symbol(to, to_row, rows, shift)`, which adds the shifts to all rows."""
    kind = "<16 x i32>"
    loads: list[str] = []
    body: list[str] = []
    for v in range(columns // 16):
        loads += [
            f"  %q{v} = getelementptr i32, ptr %shift, i64 {16 * v}",
            f"  %m{v} = load {kind}, ptr %q{v}, align 4",
        ]
        body += [
            f"  %p{v} = getelementptr i32, ptr %row, i64 {16 * v}",
            f"  %x{v} = load {kind}, ptr %p{v}, align 4",
            f"  %y{v} = add {kind} %x{v}, %m{v}",
            f"  store {kind} %y{v}, ptr %p{v}, align 4",
        ]
    return _rows_changed(_moved_symbol(columns), "ptr readonly %shift", loads, body)


def _rows_changed(symbol: str, parameters: str, before: Sequence[str], body: Sequence[str]) -> str:
    """The function `symbol(to, to_row, rows, parameters)`, whose `body` is for the `row` at hand,
    the one of the number `r`."""
    head = ["  %skip = mul i64 %r, %to_row", "  %row = getelementptr i32, ptr %to, i64 %skip"]
    return "\n".join([
        f"define void @{symbol}(ptr %to, i64 %to_row, i64 %rows, {parameters})"
        " noinline nounwind {",
        "entry:",
        *before,
        "  br label %r.do",
        *loop("r", "entry", "%rows", 1, [*head, *body], "return"),
        "return:",
        "  ret void",
        "}",
    ])  # fmt: skip
