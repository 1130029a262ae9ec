"""The matmul micro-kernel as LLVM IR: explicit vectors, the accumulators held in registers.

One function serves any number of rows of a tile. It walks register tiles, chosen so that
accumulators, a row of the panel and one broadcast fit the registers: a register tile of every
height up to the highest has its own loop over k. Columns left over are done a vector at a time.
"""

from __future__ import annotations

import re

from .tile_sums import STRETCH, UNITS, WIDTH, RegisterTile, TileShape, reads_part, sums_of

REGISTERS = {"v3": (16, 32), "v4": (32, 64)}  # vector registers, bytes of each
MOST_VECTORS = {"v3": 2, "v4": 4}
"""Vectors a row of the tile, where there are rows enough. On AVX2, 6 x 16 read one line of the
panel for each step of the sum, 4 x 24 two: 1.2 times as fast on Zen 3. With AVX-512, 6 x 64 are
1.05 times as fast as 14 x 32 on Zen 4 with packed panels, and 1.27 times where the rows of panels
are 4 KB apart."""
MOST_ROWS, SUMS = 8, 12
"""Rows of a tile where that leaves so many sums that do not wait for each other. Rows that lie a
multiple of 4 KB apart share a set of the first-level cache, whose ways are eight at least: with 16
rows of 4096, 16 x 4096 x 16 takes 2.2 times as long on Zen 4."""
LEAST_SUMS = 8
"""Sums that do not wait for each other which AVX2's units take to be busy: two multiply-adds in a
clock, four clocks each. Tiles of a row or two have fewer, and add up several steps side by side."""


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
    return min((REGISTERS[level][0] - 1 - wide) // wide, max(MOST_ROWS, SUMS // wide))


def tile_text(shape: TileShape, level: str) -> str:
    """The function `symbol(dst, dst_row, a, a_row, a_col, panel, step, places, rows, depth, width,
    add)`.

    The sums are stored, or where `add` added to what dst holds, as are those of each STRETCH of the
    depth to those before it. The rows are divided evenly: first
    register tiles with a row more, all of them for a stretch of columns before the next, so that
    its part of the panel stays in the first-level cache; then the others. `step` and `places`
    (i64, one for each k) say where the rows of the panel begin, where they are not packed.
    """
    height = tallest(shape.element, shape.columns, level)
    out = [
        f"define void @{shape.symbol}(ptr noalias %dst, i64 %dst_row, ptr readonly %a,"
        " i64 %a_row, i64 %a_col, ptr noalias readonly %panel, i64 %step,"
        " ptr noalias readonly %places, i64 %rows, i64 %depth, i64 %width, i1 %add)"
        f" noinline noduplicate nounwind{_features(shape)} {{",
        "entry:",
        f"  %stretch = call i64 @llvm.smin.i64(i64 %depth, i64 {STRETCH})",
        "  %any = icmp sgt i64 %rows, 0",
        "  br i1 %any, label %divide, label %return",
        "divide:",
        f"  %up = add i64 %rows, {height - 1}",
        f"  %tiles = udiv i64 %up, {height}",
        "  %low = udiv i64 %rows, %tiles",
        "  %higher = urem i64 %rows, %tiles",
        "  %high = add i64 %low, 1",
        "  %split = mul i64 %higher, %high",
        "  %even = icmp eq i64 %higher, 0",
        "  br i1 %even, label %second, label %choose",
        "second:",
        "  br label %choose",
        "choose:",
        "  %from = phi i64 [ 0, %divide ], [ %split, %second ]",
        "  %to = phi i64 [ %split, %divide ], [ %rows, %second ]",
        "  %each = phi i64 [ %high, %divide ], [ %low, %second ]",
        "  switch i64 %each, label %return [",
        *(f"    i64 {rows}, label %enter{rows}" for rows in range(1, height + 1)),
        "  ]",
    ]
    for rows in range(1, height + 1):
        out += _columns(shape, level, rows)
    out += [
        "done:",
        "  %more = icmp slt i64 %to, %rows",
        "  br i1 %more, label %second, label %return",
    ]
    return "\n".join([*out, "return:", "  ret void", "}"])


def _features(shape: TileShape) -> str:
    wanted = UNITS.get(shape.unit)
    return f' "target-features"="{wanted}"' if wanted else ""


def declaration(text: str) -> str:
    """What a module needs of a function of another, given that function's text."""
    head = text[: text.index("{")].strip().replace("define", "declare", 1)
    return re.sub(r" %\w+(?=[,)])", "", head)


def _columns(shape: TileShape, level: str, rows: int) -> list[str]:
    """The loops over columns and over register tiles of some rows."""
    wide, lanes = register_tile(shape.element, shape.columns, level, rows)
    main = RegisterTile(shape, rows, wide, lanes, beside=_beside(shape, level, rows * wide))
    out = [f"enter{rows}:"]
    if not shape.tails:
        out.append(f"  br label %column{rows}")
        return [*out, *_stretches(main, "0", f"%enter{rows}", "%width")]
    tail = RegisterTile(shape, rows, 1, lanes, True)
    # a vector may reach beyond the width where what lies there is still the panel's
    most = 0 if shape.rows == "steps" else lanes - 1
    out += [
        f"  %main_up{rows} = add i64 %width, {most}",
        f"  %main_rest{rows} = urem i64 %main_up{rows}, {wide * lanes}",
        f"  %main{rows} = sub i64 %main_up{rows}, %main_rest{rows}",
        f"  %main_any{rows} = icmp sgt i64 %main{rows}, 0",
        f"  br i1 %main_any{rows}, label %column{rows}, label %turn{rows}",
        *_stretches(main, "0", f"%enter{rows}", f"%main{rows}", f"turn{rows}"),
        f"turn{rows}:",
        f"  %tail_any{rows} = icmp slt i64 %main{rows}, %width",
        f"  br i1 %tail_any{rows}, label %column{rows}t, label %done",
        *_stretches(tail, f"%main{rows}", f"%turn{rows}", "%width"),
    ]
    return out


def _beside(shape: TileShape, level: str, sums: int) -> int:
    """Steps of the sum of a register tile of so many sums that are added up side by side."""
    if level != "v3" or shape.rows != "packed" or shape.unit:
        return 1
    return max(n for n in (4, 2, 1) if n == 1 or n * sums <= LEAST_SUMS)


def _stretches(
    s: RegisterTile, begin: str, entry: str, stop: str, after: str = "done"
) -> list[str]:
    """Stretches of columns from `begin` to `stop`, all rows of one before the next."""
    element, n = s.shape.element, s.name
    return [
        f"column{n}:",
        f"  %col{n} = phi i64 [ {begin}, {entry} ], [ %col_next{n}, %row_done{n} ]",
        f"  %d_col{n} = getelementptr {element}, ptr %dst, i64 %col{n}",
        f"  %p_base{n} = getelementptr {element}, ptr %panel, i64 %col{n}",
        *_mask(s),
        f"  br label %start{n}",
        f"start{n}:",
        f"  %row{n} = phi i64 [ %from, %column{n} ], [ %row_next{n}, %next{n} ]",
        f"  %a_skip{n} = mul i64 %row{n}, %a_row",
        f"  %a_base{n} = getelementptr {element}, ptr %a, i64 %a_skip{n}",
        f"  %d_skip{n} = mul i64 %row{n}, %dst_row",
        f"  %d_base{n} = getelementptr {element}, ptr %d_col{n}, i64 %d_skip{n}",
        *sums_of(s),
        f"next{n}:",
        f"  %row_next{n} = add i64 %row{n}, {s.rows}",
        f"  %more_rows{n} = icmp slt i64 %row_next{n}, %to",
        f"  br i1 %more_rows{n}, label %start{n}, label %row_done{n}",
        f"row_done{n}:",
        f"  %col_next{n} = add i64 %col{n}, {s.wide * s.lanes}",
        f"  %more{n} = icmp slt i64 %col_next{n}, {stop}",
        f"  br i1 %more{n}, label %column{n}, label %{after}",
    ]


def _mask(s: RegisterTile) -> list[str]:
    """The lanes of a tail's vector within the width."""
    if not reads_part(s):
        return []
    n = s.name
    return [  # as bits of an integer: LLVM would compare vectors in each step of the loop
        f"  %left{n} = sub i64 %width, %col{n}",
        f"  %less{n} = icmp slt i64 %left{n}, {s.lanes}",
        f"  %some{n} = select i1 %less{n}, i64 %left{n}, i64 {s.lanes}",
        f"  %none{n} = shl nsw i64 -1, %some{n}",
        f"  %long{n} = xor i64 %none{n}, -1",
        f"  %bits{n} = trunc i64 %long{n} to i{s.lanes}",
        f"  %mask{n} = bitcast i{s.lanes} %bits{n} to <{s.lanes} x i1>",
    ]
