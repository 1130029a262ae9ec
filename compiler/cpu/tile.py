"""The matmul micro-kernel as LLVM IR: explicit vectors, the accumulators held in registers.

One function serves any number of rows and columns of a tile. It walks register tiles, chosen so
that accumulators, a row of the panel and one broadcast fit the registers: a register tile of every
height up to the highest has its own loop over k, entered by a switch.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = {"v3": (16, 32), "v4": (32, 64)}  # vector registers, bytes of each
WIDTH = {"float": 4, "double": 8}
SUFFIX = {"float": "f32", "double": "f64"}


@dataclass(frozen=True)
class TileShape:
    """A micro-kernel: element type, columns of a panel row, whether it adds to dst."""

    element: str
    columns: int
    accumulate: bool

    @property
    def symbol(self) -> str:
        word = "add" if self.accumulate else "set"
        return f"sf.tile.{SUFFIX[self.element]}.{self.columns}.{word}"


def register_tile(element: str, columns: int, level: str, rows: int) -> tuple[int, int]:
    """Vectors a row and lanes of a vector of the register tile of some rows.

    The widest that leaves a register for the vector of the panel and one for a broadcast; tiles
    of several vectors keep as many of the panel, each read once for all rows.
    """
    registers, size = REGISTERS[level]
    lanes = size // WIDTH[element]
    while columns % lanes:
        lanes //= 2
    vectors = columns // lanes

    def fits(wide: int) -> bool:
        held = 1 if rows <= 2 else wide
        return rows * wide + held + (2 if rows == 2 else 1) <= registers

    return max(v for v in range(1, vectors + 1) if vectors % v == 0 and fits(v)), lanes


def tallest(element: str, columns: int, level: str) -> int:
    """The rows of the register tile that most of a product is done in: up to 3 vectors wide."""
    registers, size = REGISTERS[level]
    lanes = size // WIDTH[element]
    while columns % lanes:
        lanes //= 2
    vectors = columns // lanes
    wide = max(v for v in range(1, min(vectors, 3) + 1) if vectors % v == 0)
    return (registers - 1 - wide) // wide


def tile_text(shape: TileShape, level: str) -> str:
    """The function `symbol(dst, dst_row, a, a_row, a_col, panel, rows, depth)`."""
    element = shape.element
    height = tallest(element, shape.columns, level)
    out = [
        f"define internal void @{shape.symbol}(ptr noalias %dst, i64 %dst_row, ptr readonly %a,"
        " i64 %a_row, i64 %a_col, ptr noalias readonly %panel, i64 %rows, i64 %depth)"
        " noinline nounwind {",
        "entry:",
        "  %any = icmp sgt i64 %rows, 0",
        "  br i1 %any, label %outer, label %return",
        "outer:",
        "  %row = phi i64 [ 0, %entry ], [ %row_next, %outer_next ]",
        "  %left = sub i64 %rows, %row",
        f"  %take = call i64 @llvm.smin.i64(i64 %left, i64 {height})",
        "  %a_skip = mul i64 %row, %a_row",
        f"  %a_base = getelementptr {element}, ptr %a, i64 %a_skip",
        "  %d_skip = mul i64 %row, %dst_row",
        f"  %d_row = getelementptr {element}, ptr %dst, i64 %d_skip",
        "  switch i64 %take, label %outer_next [",
        *(f"    i64 {rows}, label %enter{rows}" for rows in range(1, height + 1)),
        "  ]",
    ]
    for rows in range(1, height + 1):
        wide, lanes = register_tile(element, shape.columns, level, rows)
        out += [
            f"enter{rows}:",
            f"  br label %start{rows}",
            f"start{rows}:",
            f"  %col{rows} = phi i64 [ 0, %enter{rows} ], [ %col_next{rows}, %next{rows} ]",
            f"  %d_base{rows} = getelementptr {element}, ptr %d_row, i64 %col{rows}",
            f"  %p_base{rows} = getelementptr {element}, ptr %panel, i64 %col{rows}",
            *_product(shape, rows, wide, lanes),
            f"next{rows}:",
            f"  %col_next{rows} = add i64 %col{rows}, {wide * lanes}",
            f"  %more{rows} = icmp slt i64 %col_next{rows}, {shape.columns}",
            f"  br i1 %more{rows}, label %start{rows}, label %outer_next",
        ]
    out += [
        "outer_next:",
        "  %row_next = add i64 %row, %take",
        "  %more_rows = icmp slt i64 %row_next, %rows",
        "  br i1 %more_rows, label %outer, label %return",
        "return:",
        "  ret void",
        "}",
    ]
    return "\n".join(out)


def _product(shape: TileShape, rows: int, wide: int, lanes: int) -> list[str]:
    """The loop over k for a register tile of some rows, then its stores."""
    element, size, t = shape.element, WIDTH[shape.element], f"r{rows}_"
    vector = f"<{lanes} x {element}>"
    cells = [(r, c) for r in range(rows) for c in range(wide)]
    suffix = f"v{lanes}f{8 * size}"
    out = []
    for r in range(rows):
        out.append(f"  %{t}o{r} = mul i64 %a_row, {r}")
        out.append(f"  %{t}a{r} = getelementptr {element}, ptr %a_base, i64 %{t}o{r}")
        out.append(f"  %{t}e{r} = mul i64 %dst_row, {r}")
        out.append(f"  %{t}d{r} = getelementptr {element}, ptr %d_base{rows}, i64 %{t}e{r}")
    out += [f"  %{t}some = icmp sgt i64 %depth, 0"]
    out += [f"  br i1 %{t}some, label %loop{rows}, label %stop{rows}", f"loop{rows}:"]
    out.append(f"  %{t}k = phi i64 [ 0, %start{rows} ], [ %{t}k1, %loop{rows} ]")
    for r, c in cells:
        out.append(
            f"  %{t}s{r}_{c} = phi {vector} [ zeroinitializer, %start{rows} ],"
            f" [ %{t}n{r}_{c}, %loop{rows} ]"
        )
    out.append(f"  %{t}pk = mul i64 %{t}k, {shape.columns}")
    out.append(f"  %{t}p = getelementptr {element}, ptr %p_base{rows}, i64 %{t}pk")
    for c in range(wide):
        out.append(f"  %{t}q{c} = getelementptr {element}, ptr %{t}p, i64 {c * lanes}")
        out.append(f"  %{t}b{c} = load {vector}, ptr %{t}q{c}, align {size}")
    out.append(f"  %{t}ak = mul i64 %{t}k, %a_col")
    for r in range(rows):
        out += [
            f"  %{t}f{r} = getelementptr {element}, ptr %{t}a{r}, i64 %{t}ak",
            f"  %{t}x{r} = load {element}, ptr %{t}f{r}, align {size}",
            f"  %{t}i{r} = insertelement {vector} poison, {element} %{t}x{r}, i64 0",
            f"  %{t}v{r} = shufflevector {vector} %{t}i{r}, {vector} poison,"
            f" <{lanes} x i32> zeroinitializer",
        ]
        for c in range(wide):
            out.append(
                f"  %{t}n{r}_{c} = call {vector} @llvm.fma.{suffix}({vector} %{t}v{r},"
                f" {vector} %{t}b{c}, {vector} %{t}s{r}_{c})"
            )
    out += [
        f"  %{t}k1 = add nuw nsw i64 %{t}k, 1",
        f"  %{t}m = icmp slt i64 %{t}k1, %depth",
        f"  br i1 %{t}m, label %loop{rows}, label %stop{rows}",
        f"stop{rows}:",
    ]
    for r, c in cells:
        out.append(
            f"  %{t}z{r}_{c} = phi {vector} [ zeroinitializer, %start{rows} ],"
            f" [ %{t}n{r}_{c}, %loop{rows} ]"
        )
    for r, c in cells:
        out.append(f"  %{t}w{r}_{c} = getelementptr {element}, ptr %{t}d{r}, i64 {c * lanes}")
        value = f"%{t}z{r}_{c}"
        if shape.accumulate:
            out.append(f"  %{t}g{r}_{c} = load {vector}, ptr %{t}w{r}_{c}, align {size}")
            out.append(f"  %{t}h{r}_{c} = fadd {vector} %{t}g{r}_{c}, {value}")
            value = f"%{t}h{r}_{c}"
        out.append(f"  store {vector} {value}, ptr %{t}w{r}_{c}, align {size}")
    out.append(f"  br label %next{rows}")
    return out
