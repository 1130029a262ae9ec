"""Products of what was bf16, by the dot products that vectors have of pairs of them, as LLVM IR.

A processor may have these (AVX512-BF16, `vdpbf16ps`) and no AMX: twice as many products in an
instruction as a multiply-add of f32 has. Rows and panels are cut as for tiles, see `pieces`, and
are multiplied here where they are high pieces alone: numbers of 8 bits, from 2^-62 to 2^62 (in
panels from 2^-40) or 0. Their products are exact in f32, and they and sums of them are multiples
of 2^-116, so that nothing is lost of the instruction taking denormals for zeros. It rounds each
addition to nearest, or the two of a pair at once: no more often than a multiply-add.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, VDPBF16PS.
"""

from __future__ import annotations

from .byte_lines import loop
from .cutting import FLOATS, STEP, WORDS, panel_bytes, row_bytes
from .tile_sums import STRETCH

ROWS = 8
"""Of a register tile: rows are cut with zeros up to 16, so that they always come in eights."""
_PAIRS = "<32 x bfloat>"
DECLARATION = f"declare {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512({FLOATS}, {_PAIRS}, {_PAIRS})"


def symbol(columns: int) -> str:
    return f"sf.halves.{columns}"


def guess(placed: bool) -> list[str]:
    """The block `guess`, which goes on to `look` if numbers at the beginning of rows and of a panel
    have no bits behind those of bf16, and the panel's are not all 0; to `vectors` if they have."""
    at = ["  %guess_panel = getelementptr float, ptr %panel, i64 0"]
    if placed:
        at = [
            "  %guess_place = load i64, ptr %places, align 8",
            "  %guess_panel = getelementptr float, ptr %panel, i64 %guess_place",
        ]
    return [
        "guess:",
        *at,
        f"  %guess_x = load {WORDS}, ptr %a, align 4",
        f"  %guess_y = load {WORDS}, ptr %guess_panel, align 4",
        f"  %guess_bits = or {WORDS} %guess_x, %guess_y",
        f"  %guess_low = and {WORDS} %guess_bits, splat (i32 65535)",
        f"  %guess_zero = icmp eq {WORDS} %guess_y, zeroinitializer",
        f"  %guess_more = icmp ne {WORDS} %guess_low, zeroinitializer",
        "  %guess_zeros = bitcast <16 x i1> %guess_zero to i16",
        "  %guess_mores = bitcast <16 x i1> %guess_more to i16",
        "  %guess_none = icmp eq i16 %guess_zeros, -1",
        "  %guess_some = icmp ne i16 %guess_mores, 0",
        "  %guess_not = or i1 %guess_none, %guess_some",
        "  br i1 %guess_not, label %vectors, label %look",
    ]


def dots_text(columns: int) -> str:
    """The function `symbol(dst, dst_row, left, right, rows, depth, width, add)`: cut rows by a cut
    panel, of both of which the high pieces are read. Rows of dst are there to be overwritten up to
    a multiple of eight. The two bf16 of 4 bytes are 16 steps apart in both."""
    wide = next(n for n in (3, 2, 1) if columns % (16 * n) == 0)
    column = [
        "  %d_col = getelementptr float, ptr %dst, i64 %c",
        f"  %p_skip = mul i64 %c, {1024 // 16}",
        "  %base = getelementptr i8, ptr %right, i64 %p_skip",
        "  br label %r.do",
        *loop("r", "c.do", "%rows", ROWS, _tile(wide, columns), "rowed"),
        "rowed:",
    ]
    return "\n".join([
        f"define void @{symbol(columns)}(ptr noalias %dst, i64 %dst_row,"
        " ptr readonly %left, ptr readonly %right, i64 %rows, i64 %depth, i64 %width, i1 %add)"
        ' noinline nounwind "target-features"="+avx512bf16" {',
        "entry:",
        "  br label %c.do",
        *loop("c", "entry", "%width", 16 * wide, column, "return"),
        "return:",
        "  ret void",
        "}",
    ])  # fmt: skip


def _cells(wide: int) -> list[str]:
    """Row and vector of each sum of a register tile."""
    return [f"{r}_{c}" for r in range(ROWS) for c in range(wide)]


def _phis(wide: int, name: str, one: str, other: str) -> list[str]:
    """The sums at the start of a block with two ways in."""
    return [
        f"  %{name}{x} = phi {FLOATS} [ {one.format(x)} ], [ {other.format(x)} ]"
        for x in _cells(wide)
    ]


def _addresses(wide: int) -> list[str]:
    """Where the rows of a register tile begin, and where its vectors go."""
    out = [
        "  %half = lshr i64 %r, 4",
        "  %inside = and i64 %r, 15",
        "  %o1 = shl i64 %half, 10",
        "  %o2 = shl i64 %inside, 6",
        "  %o = add i64 %o1, %o2",
        "  %first = getelementptr i8, ptr %left, i64 %o",
        "  %d_skip = mul i64 %r, %dst_row",
        "  %to = getelementptr float, ptr %d_col, i64 %d_skip",
    ]
    for r in range(ROWS):
        out += [
            f"  %e{r} = mul i64 %dst_row, {r}",
            f"  %d{r} = getelementptr float, ptr %to, i64 %e{r}",
            *(f"  %w{r}_{c} = getelementptr float, ptr %d{r}, i64 {16 * c}" for c in range(wide)),
        ]
    return out


def _tile(wide: int, columns: int) -> list[str]:
    """Eight rows by some vectors of a panel: stretches of the depth, in pairs."""
    return [
        *_addresses(wide),
        "  br label %begin",
        "begin:",
        "  %from = phi i64 [ 0, %r.do ], [ %k1, %store ]",
        "  %adds = phi i1 [ %add, %r.do ], [ true, %store ]",
        "  %l0 = phi ptr [ %first, %r.do ], [ %l1, %store ]",
        "  %p0 = phi ptr [ %base, %r.do ], [ %p1, %store ]",
        f"  %far = add i64 %from, {STRETCH}",
        "  %near = icmp slt i64 %far, %depth",
        "  %last = select i1 %near, i64 %far, i64 %depth",
        "  br label %step",
        "step:",
        "  %k = phi i64 [ %from, %begin ], [ %k1, %stepped ]",
        "  %l = phi ptr [ %l0, %begin ], [ %l1, %stepped ]",
        "  %p = phi ptr [ %p0, %begin ], [ %p1, %stepped ]",
        *_phis(wide, "t", "zeroinitializer, %begin", "%n{}, %stepped"),
        "  br label %pair",
        "pair:",
        "  %j = phi i64 [ 0, %step ], [ %j1, %pair ]",
        *_phis(wide, "s", "%t{}, %step", "%n{}, %pair"),
        *_pair(wide),
        "  %j1 = add nuw nsw i64 %j, 1",
        "  %more_pairs = icmp ult i64 %j1, 16",
        "  br i1 %more_pairs, label %pair, label %stepped",
        "stepped:",
        f"  %l1 = getelementptr i8, ptr %l, i64 {row_bytes(1)}",
        f"  %p1 = getelementptr i8, ptr %p, i64 {panel_bytes(columns, 1)}",
        f"  %k1 = add nuw nsw i64 %k, {STEP}",
        "  %more_steps = icmp slt i64 %k1, %last",
        "  br i1 %more_steps, label %step, label %stop",
        "stop:",
        "  br i1 %adds, label %sum, label %store",
        "sum:",
        *(f"  %g{x} = load {FLOATS}, ptr %w{x}, align 4" for x in _cells(wide)),
        *(f"  %h{x} = fadd {FLOATS} %g{x}, %n{x}" for x in _cells(wide)),
        "  br label %store",
        "store:",
        *_phis(wide, "z", "%n{}, %stop", "%h{}, %sum"),
        *(f"  store {FLOATS} %z{x}, ptr %w{x}, align 4" for x in _cells(wide)),
        "  br i1 %near, label %begin, label %stored",
        "stored:",
    ]


def _pair(wide: int) -> list[str]:
    """A pair of every row, repeated, by those of the panel's columns."""
    out = [
        "  %l_skip = shl i64 %j, 2",
        "  %l_at = getelementptr i8, ptr %l, i64 %l_skip",
        "  %b_skip = shl i64 %j, 6",
        "  %b_at = getelementptr i8, ptr %p, i64 %b_skip",
    ]
    for c in range(wide):
        out += [
            f"  %q{c} = getelementptr i8, ptr %b_at, i64 {1024 * c}",
            f"  %b{c} = load {_PAIRS}, ptr %q{c}, align 64",
        ]
    for r in range(ROWS):
        out += [
            f"  %f{r} = getelementptr i8, ptr %l_at, i64 {64 * r}",
            f"  %x{r} = load i32, ptr %f{r}, align 4",
            f"  %i{r} = insertelement {WORDS} poison, i32 %x{r}, i64 0",
            f"  %v{r} = shufflevector {WORDS} %i{r}, {WORDS} poison, <16 x i32> zeroinitializer",
            f"  %a{r} = bitcast {WORDS} %v{r} to {_PAIRS}",
        ]
        for c in range(wide):
            cell = f"{r}_{c}"
            out.append(
                f"  %n{cell} = call {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512({FLOATS} %s{cell},"
                f" {_PAIRS} %a{r}, {_PAIRS} %b{c})"
            )
    return out
