"""The matmul micro-kernel as LLVM IR: explicit vectors, the accumulators held in registers.

One function serves any number of rows of a tile. It walks register tiles, chosen so that
accumulators, a row of the panel and one broadcast fit the registers: a register tile of every
height up to the highest has its own loop over k.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = {"v3": (16, 32), "v4": (32, 64)}  # vector registers, bytes of each
WIDTH = {"float": 4, "double": 8}
MOST_VECTORS = {"v3": 2, "v4": 3}
"""Vectors a row of the tile, where there are rows enough. On AVX2, 6 x 16 read one line of the
panel for each step of the sum, 4 x 24 two: 1.2 times as fast on Zen 3."""
SUFFIX = {"float": "f32", "double": "f64"}


@dataclass(frozen=True)
class TileShape:
    """A micro-kernel: element type and columns of a panel row."""

    element: str
    columns: int

    @property
    def symbol(self) -> str:
        return f"sf.tile.{SUFFIX[self.element]}.{self.columns}"


def lanes_of(element: str, columns: int, level: str) -> int:
    """Lanes of the widest vector that divides a panel's row."""
    lanes = REGISTERS[level][1] // WIDTH[element]
    while columns % lanes:
        lanes //= 2
    return lanes


def register_tile(element: str, columns: int, level: str, rows: int) -> tuple[int, int]:
    """Vectors a row and lanes of a vector of the register tile of some rows.

    The widest that leaves registers for the panel's vectors, each read once for all rows, and
    for a broadcast. A row or two read them one at a time.
    """
    lanes = lanes_of(element, columns, level)
    vectors = columns // lanes

    def fits(wide: int) -> bool:
        others = 1 + rows if rows <= 2 else 1 + wide
        return rows * wide + others <= REGISTERS[level][0]

    return max(v for v in range(1, vectors + 1) if vectors % v == 0 and fits(v)), lanes


def tallest(element: str, columns: int, level: str) -> int:
    """The rows of the register tile that most of a product is done in."""
    vectors = columns // lanes_of(element, columns, level)
    most = MOST_VECTORS[level]
    wide = max(v for v in range(1, min(vectors, most) + 1) if vectors % v == 0)
    return (REGISTERS[level][0] - 1 - wide) // wide


def tile_text(shape: TileShape, level: str) -> str:
    """The function `symbol(dst, dst_row, a, a_row, a_col, panel, rows, depth, width, add)`.

    The sums start at 0, or where `add` at what dst holds. Whole register tiles first, all of
    them for a stretch of columns before the next, so that its part of the panel stays in the
    first-level cache; then what rows are left.
    """
    element = shape.element
    height = tallest(element, shape.columns, level)
    out = [
        f"define internal void @{shape.symbol}(ptr noalias %dst, i64 %dst_row, ptr readonly %a,"
        " i64 %a_row, i64 %a_col, ptr noalias readonly %panel, i64 %rows, i64 %depth,"
        " i64 %width, i1 %add)"
        " noinline noduplicate nounwind {",
        "entry:",
        f"  %rest = urem i64 %rows, {height}",
        "  %whole = sub i64 %rows, %rest",
        f"  %some = icmp sge i64 %rows, {height}",
        f"  br i1 %some, label %enter{height}, label %last",
        "last:",
        "  switch i64 %rest, label %return [",
        *(f"    i64 {rows}, label %enter{rows}" for rows in range(1, height)),
        "  ]",
    ]
    for rows in range(1, height + 1):
        end = ("%rows", "%return") if rows < height else ("%whole", "%last")
        out += _columns(shape, level, rows, *end)
    return "\n".join([*out, "return:", "  ret void", "}"])


def _columns(shape: TileShape, level: str, rows: int, end: str, after: str) -> list[str]:
    """The loops over columns and over register tiles of some rows, from the first left to `end`."""
    element = shape.element
    wide, lanes = register_tile(element, shape.columns, level, rows)
    first = "0" if end == "%whole" else "%whole"
    return [
        f"enter{rows}:",
        f"  br label %column{rows}",
        f"column{rows}:",
        f"  %col{rows} = phi i64 [ 0, %enter{rows} ], [ %col_next{rows}, %row_done{rows} ]",
        f"  %d_col{rows} = getelementptr {element}, ptr %dst, i64 %col{rows}",
        f"  %p_base{rows} = getelementptr {element}, ptr %panel, i64 %col{rows}",
        f"  br label %start{rows}",
        f"start{rows}:",
        f"  %row{rows} = phi i64 [ {first}, %column{rows} ], [ %row_next{rows}, %next{rows} ]",
        f"  %a_skip{rows} = mul i64 %row{rows}, %a_row",
        f"  %a_base{rows} = getelementptr {element}, ptr %a, i64 %a_skip{rows}",
        f"  %d_skip{rows} = mul i64 %row{rows}, %dst_row",
        f"  %d_base{rows} = getelementptr {element}, ptr %d_col{rows}, i64 %d_skip{rows}",
        *_product(shape, rows, wide, lanes),
        f"next{rows}:",
        f"  %row_next{rows} = add i64 %row{rows}, {rows}",
        f"  %more_rows{rows} = icmp slt i64 %row_next{rows}, {end}",
        f"  br i1 %more_rows{rows}, label %start{rows}, label %row_done{rows}",
        f"row_done{rows}:",
        f"  %col_next{rows} = add i64 %col{rows}, {wide * lanes}",
        f"  %more{rows} = icmp slt i64 %col_next{rows}, %width",
        f"  br i1 %more{rows}, label %column{rows}, label {after}",
    ]


def _product(shape: TileShape, rows: int, wide: int, lanes: int) -> list[str]:
    """The loop over k for a register tile of some rows, then its stores."""
    element, size, t = shape.element, WIDTH[shape.element], f"r{rows}_"
    vector = f"<{lanes} x {element}>"
    cells = [(r, c) for r in range(rows) for c in range(wide)]
    suffix = f"v{lanes}f{8 * size}"
    out = []
    for r in range(rows):
        out.append(f"  %{t}o{r} = mul i64 %a_row, {r}")
        out.append(f"  %{t}a{r} = getelementptr {element}, ptr %a_base{rows}, i64 %{t}o{r}")
        out.append(f"  %{t}e{r} = mul i64 %dst_row, {r}")
        out.append(f"  %{t}d{r} = getelementptr {element}, ptr %d_base{rows}, i64 %{t}e{r}")
    for r, c in cells:
        out.append(f"  %{t}w{r}_{c} = getelementptr {element}, ptr %{t}d{r}, i64 {c * lanes}")
    out += [f"  br i1 %add, label %add{rows}, label %begin{rows}", f"add{rows}:"]
    for r, c in cells:
        out.append(f"  %{t}g{r}_{c} = load {vector}, ptr %{t}w{r}_{c}, align {size}")
    out += [f"  br label %begin{rows}", f"begin{rows}:"]
    for r, c in cells:
        out.append(
            f"  %{t}h{r}_{c} = phi {vector} [ zeroinitializer, %start{rows} ],"
            f" [ %{t}g{r}_{c}, %add{rows} ]"
        )
    out += [f"  %{t}some = icmp sgt i64 %depth, 0"]
    out += [f"  br i1 %{t}some, label %loop{rows}, label %stop{rows}", f"loop{rows}:"]
    out.append(f"  %{t}k = phi i64 [ 0, %begin{rows} ], [ %{t}k1, %loop{rows} ]")
    for r, c in cells:
        out.append(
            f"  %{t}s{r}_{c} = phi {vector} [ %{t}h{r}_{c}, %begin{rows} ],"
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
            f"  %{t}z{r}_{c} = phi {vector} [ %{t}h{r}_{c}, %begin{rows} ],"
            f" [ %{t}n{r}_{c}, %loop{rows} ]"
        )
    for r, c in cells:
        out.append(f"  store {vector} %{t}z{r}_{c}, ptr %{t}w{r}_{c}, align {size}")
    out.append(f"  br label %next{rows}")
    return out
