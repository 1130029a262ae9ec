"""Cutting f32 rows and panels into the bf16 pieces of `pieces`, as LLVM IR.

Where the cut rows lie: for every 32 steps of the sum the three pieces, of each two tiles of 16
rows by 64 bytes; a panel's, of each piece as many tiles as it has columns by 16. The two bf16 of
4 bytes are 16 steps apart: so that no element changes its lane. Where high pieces alone are
multiplied, see `halves`, they are all that is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

STEP = 32
"""Of a sum, what one instruction takes."""
MARK_BYTES = 64
"""Behind the pieces of a panel that was cut beforehand: what `BAD` and `PIECES` say of it."""
BAD, PIECES = 1, 2
"""Bits of what is said of rows or a panel: whether it is out of range, and whether anything but its
high pieces is not 0: what comes of bf16 has no others."""
_LOW = {"rows": -62, "panel": -40}
_HIGH = 62
FLOATS, WORDS, HALVES = "<16 x float>", "<16 x i32>", "<32 x i16>"


def row_bytes(pieces: int) -> int:
    """Of cut rows, for every 32 steps."""
    return pieces * 2 * 1024


def panel_bytes(columns: int, pieces: int = 3) -> int:
    """Of a cut panel, for every 32 steps."""
    return pieces * columns // 16 * 1024


def _splat(value: int, bits: int = 32) -> str:
    return f"splat (i{bits} {value})"


def _lanes(first: int) -> str:
    return "<" + ", ".join(f"i64 {first + lane}" for lane in range(16)) + ">"


def _cut(name: str, x: str, y: str, before: Seen, to: Sequence[str]) -> list[str]:
    """Stores the pieces of two vectors, three or the high one; `Seen(name)` is what it has seen.

    `low` and `high` are of the high pieces' magnitudes, less one where low, so that 0 is none of
    the small ones; `rest` are all bits of what should be low pieces, of which half are 0 unless a
    number is so small that its high piece is 0; `more` are all bits of the middle pieces, or
    of the numbers where only high pieces are wanted, which end in zeros then.
    """
    if len(to) == 1:
        return [*_cut_high(name, x, y, before, to[0]), *_noted(name, before)]
    out = []
    for v, value in (("x", x), ("y", y)):
        t, rest = f"%{name}.{v}", value
        out.append(f"  {t}0 = bitcast {FLOATS} {value} to {WORDS}")
        for bits, piece, left in (("0", "h", "1"), ("1", "m", "l")):
            out += [
                f"  {t}{piece}.up = add {WORDS} {t}{bits}, {_splat(0x8000)}",
                f"  {t}{piece} = and {WORDS} {t}{piece}.up, {_splat(-65536)}",
                f"  {t}{piece}.f = bitcast {WORDS} {t}{piece} to {FLOATS}",
                f"  {t}{piece}.rest = fsub {FLOATS} {rest}, {t}{piece}.f",
                f"  {t}{left} = bitcast {FLOATS} {t}{piece}.rest to {WORDS}",
            ]
            rest = f"{t}{piece}.rest"
    for piece, place in zip("hml", to, strict=True):
        out += [
            f"  %{name}.{piece}0 = lshr {WORDS} %{name}.x{piece}, {_splat(16)}",
            f"  %{name}.{piece}1 = and {WORDS} %{name}.y{piece}, {_splat(-65536)}",
            f"  %{name}.{piece}2 = or {WORDS} %{name}.{piece}0, %{name}.{piece}1",
            f"  store {WORDS} %{name}.{piece}2, ptr {place}, align 64",
        ]
    return [
        *out,
        f"  %{name}.bits = or {WORDS} %{name}.xl, %{name}.yl",
        f"  %{name}.rest = or {WORDS} {before.rest}, %{name}.bits",
        f"  %{name}.more = or {WORDS} {before.more}, %{name}.m2",
        *_noted(name, before),
    ]


def _cut_high(name: str, x: str, y: str, before: Seen, to: str) -> list[str]:
    """Stores the high bits of two vectors, which are all that a number of bf16 has."""
    t = f"%{name}"
    return [
        f"  {t}.x = bitcast {FLOATS} {x} to {WORDS}",
        f"  {t}.y = bitcast {FLOATS} {y} to {WORDS}",
        f"  {t}.x.up = lshr {WORDS} {t}.x, {_splat(16)}",
        f"  {t}.y.up = and {WORDS} {t}.y, {_splat(-65536)}",
        f"  {t}.h2 = or {WORDS} {t}.x.up, {t}.y.up",
        f"  store {WORDS} {t}.h2, ptr {to}, align 64",
        f"  {t}.both = or {WORDS} {t}.x, {t}.y",
        f"  {t}.ends = and {WORDS} {t}.both, {_splat(0xFFFF)}",
        f"  {t}.more = or {WORDS} {before.more}, {t}.ends",
        f"  {t}.rest = or {WORDS} {before.rest}, zeroinitializer",
    ]


def _noted(name: str, before: Seen) -> list[str]:
    """What has been seen of magnitudes, with those of another vector of high pieces."""
    return [
        f"  %{name}.seen = bitcast {WORDS} %{name}.h2 to {HALVES}",
        f"  %{name}.abs = and {HALVES} %{name}.seen, {_splat(0x7FFF, 16)}",
        f"  %{name}.less = add {HALVES} %{name}.abs, {_splat(-1, 16)}",
        f"  %{name}.low = call {HALVES} @llvm.umin.v32i16({HALVES} {before.low},"
        f" {HALVES} %{name}.less)",
        f"  %{name}.high = call {HALVES} @llvm.umax.v32i16({HALVES} {before.high},"
        f" {HALVES} %{name}.abs)",
    ]


class Seen:
    """The values in which cutting keeps what it has seen, see `_cut`."""

    def __init__(self, name: str) -> None:
        self.low, self.high, self.rest, self.more = self.all = tuple(
            f"%{name}.{x}" for x in ("low", "high", "rest", "more")
        )

    def phis(self, start: str, entry: Seen | None, latch: str, last: Seen) -> list[str]:
        """The same of a loop that comes from `start`, with nothing seen there unless given."""
        none = (_splat(-1, 16), *["zeroinitializer"] * 3)
        first = none if entry is None else entry.all
        kinds = (HALVES, HALVES, WORDS, WORDS)
        return [
            f"  {name} = phi {kind} [ {begin}, %{start} ], [ {end}, %{latch} ]"
            for name, kind, begin, end in zip(self.all, kinds, first, last.all, strict=True)
        ]

    def verdict(self, kind: str) -> list[str]:
        """Returns what `BAD` and `PIECES` say of all that was seen."""
        least, most = ((127 + _LOW[kind]) << 7) - 1, (127 + _HIGH) << 7
        return [
            f"  %small = icmp ult {HALVES} {self.low}, {_splat(least, 16)}",
            f"  %large = icmp uge {HALVES} {self.high}, {_splat(most, 16)}",
            f"  %inexact.words = and {WORDS} {self.rest}, {_splat(0xFFFF)}",
            f"  %inexact.halves = bitcast {WORDS} %inexact.words to {HALVES}",
            f"  %inexact = icmp ne {HALVES} %inexact.halves, zeroinitializer",
            "  %either = or <32 x i1> %small, %large",
            "  %any = or <32 x i1> %either, %inexact",
            "  %bits = bitcast <32 x i1> %any to i32",
            "  %bad = icmp ne i32 %bits, 0",
            f"  %some.lanes = icmp ne {WORDS} {self.more}, zeroinitializer",
            "  %some.bits = bitcast <16 x i1> %some.lanes to i16",
            "  %some = icmp ne i16 %some.bits, 0",
            f"  %bad.flag = select i1 %bad, i64 {BAD}, i64 0",
            f"  %some.flag = select i1 %some, i64 {PIECES}, i64 0",
            "  %flags = or i64 %bad.flag, %some.flag",
            "  ret i64 %flags",
        ]


def _spread(name: str, value: str) -> list[str]:
    return [
        f"  %{name}.in = insertelement <16 x i64> poison, i64 {value}, i64 0",
        f"  %{name} = shufflevector <16 x i64> %{name}.in, <16 x i64> poison,"
        " <16 x i32> zeroinitializer",
    ]


def _load(name: str, at: str, mask: str) -> str:
    return (
        f"  %{name} = call {FLOATS} @llvm.masked.load.v16f32.p0(ptr align 4 {at},"
        f" <16 x i1> {mask}, {FLOATS} zeroinitializer)"
    )


_FAMILY = {3: "pieces", 1: "halves"}


def rows_symbol(pieces: int) -> str:
    return f"sf.{_FAMILY[pieces]}.rows"


def rows_text(pieces: int) -> str:
    """`rows_symbol(a, a_row, rows, depth, to)`: cuts rows into three pieces or their high ones,
    with zeros up to 16 or 32 of them and up to a multiple of 32 steps. Returns their flags."""
    cut, before, inside = Seen("c"), Seen("row"), Seen("step")
    places = [f"%p{n}" for n in range(pieces)]
    return "\n".join(
        [
            f"define internal i64 @{rows_symbol(pieces)}(ptr %a, i64 %a_row, i64 %rows,"
            " i64 %depth, ptr %to) nounwind {",
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
            *(f"  %p{n} = getelementptr i8, ptr %p0, i64 {2048 * n}" for n in range(1, pieces)),
            *_cut("c", "%x", "%y", inside, places),
            f"  %next = getelementptr i8, ptr %p0, i64 {row_bytes(pieces)}",
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


def panel_symbol(columns: int, placed: bool, pieces: int = 3) -> str:
    return f"sf.{_FAMILY[pieces]}.panel.{columns}{'.places' if placed else ''}"


def _two_rows(columns: int, placed: bool) -> list[str]:
    """Where rows k0 and k1 of a panel lie, as %a0 and %a1."""
    if not placed:
        return [
            f"  %s0 = mul i64 %k0, {columns}",
            "  %a0 = getelementptr float, ptr %panel, i64 %s0",
            f"  %a1 = getelementptr float, ptr %a0, i64 {16 * columns}",
        ]
    rows = []
    for n in ("0", "1"):
        rows += [
            f"  %in{n} = select i1 %is{n}, i64 %k{n}, i64 0",
            f"  %pp{n} = getelementptr i64, ptr %places, i64 %in{n}",
            f"  %s{n} = load i64, ptr %pp{n}, align 8",
            f"  %a{n} = getelementptr float, ptr %panel, i64 %s{n}",
        ]
    return rows


def panel_text(columns: int, placed: bool, pieces: int) -> list[str]:
    """`panel_symbol(panel, places, depth, to)`: cuts a panel into three pieces or its high ones,
    with zeros up to a multiple of 32 steps. Returns its flags. `placed`: whether its rows lie at
    places of a table."""
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
        for piece in range(pieces):
            place = 1024 * (piece * tiles + c)
            body.append(f"  %p{c}.{piece} = getelementptr i8, ptr %out, i64 {place}")
        places = [f"%p{c}.{piece}" for piece in range(pieces)]
        body += _cut(f"c{c}", f"%x{c}", f"%y{c}", seen, places)
        seen = Seen(f"c{c}")
    return [
        f"define i64 @{panel_symbol(columns, placed, pieces)}(ptr %panel, ptr %places, i64 %depth,"
        " ptr %to) nounwind {",
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
        *_two_rows(columns, placed),
        f"  %o0 = mul i64 %step, {panel_bytes(columns, pieces)}",
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


def cut_text(columns: int) -> str:
    """The kernel `sf_cut_N` over panels that lie one after the other: each becomes as many bytes as
    its pieces are, and MARK_BYTES. Its arguments: the panels, their depth, and where to."""
    return f"""declare i64 @sf.pieces.panel.{columns}(ptr, ptr, i64, ptr) nounwind

define void @sf_cut_{columns}(ptr %args, i64 %begin, i64 %end, ptr %scratch, ptr %status)
    nounwind {{
entry:
  %panels = load ptr, ptr %args, align 8
  %depth_at = getelementptr i64, ptr %args, i64 1
  %depth = load i64, ptr %depth_at, align 8
  %to_at = getelementptr i64, ptr %args, i64 2
  %to = load ptr, ptr %to_at, align 8
  %up = add i64 %depth, {STEP - 1}
  %steps = udiv i64 %up, {STEP}
  %behind = mul i64 %steps, {panel_bytes(columns)}
  %each = add i64 %behind, {MARK_BYTES}
  %size = mul i64 %depth, {4 * columns}
  %some = icmp slt i64 %begin, %end
  br i1 %some, label %panel, label %done
panel:
  %p = phi i64 [ %begin, %entry ], [ %p1, %panel ]
  %skip = mul i64 %p, %size
  %from = getelementptr i8, ptr %panels, i64 %skip
  %place = mul i64 %p, %each
  %out = getelementptr i8, ptr %to, i64 %place
  %flags = call i64 @sf.pieces.panel.{columns}(ptr %from, ptr null, i64 %depth, ptr %out)
  %mark = getelementptr i8, ptr %out, i64 %behind
  store i64 %flags, ptr %mark, align 8
  %p1 = add i64 %p, 1
  %more = icmp slt i64 %p1, %end
  br i1 %more, label %panel, label %done
done:
  ret void
}}"""
