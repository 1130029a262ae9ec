"""Blocks of a matrix that are copied so that its rows become columns, in registers.

LLVM makes a loop over them of gathers, which take 1.7 to 4 clocks an element; shuffles take a
quarter of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from stagefuse.compiler.kernel_ir import For, Index, Load, Store
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.frozen import frozen

from .tile import REGISTERS

SIZES = (4, 8)
"""Bytes of an element."""
LANE = 16
"""Bytes within which a shuffle of two vectors interleaves their elements."""


@frozen
class Turn:
    """A nest of loops that stores element (r, c) of a matrix at (c, r): `r` steps by one in what is
    read, and by `to` in what is written; `c` by `step` in what is read."""

    store: Store
    load: Load
    rows: For
    columns: For
    step: Expr
    to: Expr


def turn_of(s: For, shapes: dict[str, tuple[Expr, ...]]) -> Turn | None:
    """The turn that a nest of loops is, if it is one of elements of 4 or 8 bytes."""
    inner = s.body[0] if len(s.body) == 1 else None
    store = inner.body[0] if isinstance(inner, For) and len(inner.body) == 1 else None
    if not isinstance(inner, For) or not isinstance(store, Store) or s.vector:
        return None
    load = store.value
    if not isinstance(load, Load) or load.guard or load.stored.itemsize not in SIZES:
        return None
    if load.buffer == store.buffer:
        return None
    if s.index in (inner.lo.symbols() | inner.hi.symbols()) or load.stored != load.dtype:
        return None
    read, written = place_of(load, shapes), place_of(store, shapes)
    if read is None or written is None:
        return None
    for a, b in ((s, inner), (inner, s)):
        along, step = read.coefficient(a.index), read.coefficient(b.index)
        to, across = written.coefficient(a.index), written.coefficient(b.index)
        if along == across == const(1) and step is not None and to is not None:
            others = {a.index, b.index}
            if (step.symbols() | to.symbols()) & others or const(0) in (step, to):
                return None
            return None if const(1) in (step, to) else Turn(store, load, a, b, step, to)
    return None


def place_of(at: Load | Store, shapes: Mapping[str, tuple[Expr, ...]]) -> Expr | None:
    """Where in its buffer an element is, if that is an expression."""
    place = const(0)
    for index, extent in zip(at.indices, shapes[at.buffer], strict=True):
        if not isinstance(index, Index):
            return None
        place = place * extent + index.expr
    return place


def symbol(size: int) -> str:
    return f"sf.turn.{8 * size}"


def turn_text(size: int, level: str) -> str:
    """The function `symbol(dst, dst_row, src, src_row, rows, columns)`: dst[r, c] = src[c, r], of
    elements of `size` bytes. Squares of whole vectors, or of half ones where a side is shorter than
    a vector, then element by element what is left."""
    wide = REGISTERS[level][1]
    lanes = wide // size
    return "\n".join(
        [
            f"define void @{symbol(size)}(ptr noalias %dst, i64 %dst_row, ptr noalias readonly"
            " %src, i64 %src_row, i64 %rows_in, i64 %columns_in) noinline noduplicate nounwind {",
            "entry:",
            "  %rows_any = icmp sgt i64 %rows_in, 0",
            "  %rows = select i1 %rows_any, i64 %rows_in, i64 0",
            "  %columns_any = icmp sgt i64 %columns_in, 0",
            "  %columns = select i1 %columns_any, i64 %columns_in, i64 0",
            "  %least = call i64 @llvm.smin.i64(i64 %rows, i64 %columns)",
            f"  %is_short = icmp slt i64 %least, {lanes}",
            "  br i1 %is_short, label %h, label %w",
            *_squares("w", size, lanes),
            *_squares("h", size, lanes // 2),
            "return:",
            "  ret void",
            "}",
        ]
    )


def _squares(n: str, size: int, lanes: int) -> list[str]:
    """All of a matrix by squares of some lanes, in names that begin with `n`. Where more than a
    quarter of a square is left of a side, the last one begins so early that it is whole."""
    lines, sides = [f"{n}:"], list[tuple[str, str, str]]()
    for side in ("rows", "columns"):
        end, most = f"%{n}.{side}", f"%{n}.last_{side}"
        lines += [
            f"  {most} = sub i64 %{side}, {lanes}",
            f"  {end}.rest = and i64 %{side}, {lanes - 1}",
            f"  {end}.whole = sub i64 %{side}, {end}.rest",
            f"  {end}.more = icmp ugt i64 {end}.rest, {lanes // 4}",
            f"  {end}.fits = icmp sge i64 {most}, 0",
            f"  {end}.again = and i1 {end}.more, {end}.fits",
            f"  {end} = select i1 {end}.again, i64 %{side}, i64 {end}.whole",
        ]
        sides.append((end, f"%{side}", most))
    (down, rows, last_row), (across, columns, last_column) = sides
    element = f"i{8 * size}"
    square = [
        f"  %$.r0 = call i64 @llvm.smin.i64(i64 %$.r, i64 {last_row})",
        f"  %$.c0 = call i64 @llvm.smin.i64(i64 %$.c, i64 {last_column})",
        *_place("%$.r0", "%$.c0"),
        *_square(size, size * lanes),
    ]
    one = [*_place("%$.r", "%$.c"), *_one(element)]
    return [
        *lines,
        *_nest(f"{n}s", ("0", down), ("0", across), lanes, square, f"{n}.right"),
        f"{n}.right:",
        *_nest(f"{n}a", ("0", down), (across, columns), 1, one, f"{n}.below"),
        f"{n}.below:",
        *_nest(f"{n}b", (down, rows), ("0", columns), 1, one, "return"),
    ]


def _place(row: str, column: str) -> list[str]:
    return [
        f"  %$.to_row = mul i64 {row}, %dst_row",
        f"  %$.to = add i64 %$.to_row, {column}",
        f"  %$.from_row = mul i64 {column}, %src_row",
        f"  %$.from = add i64 %$.from_row, {row}",
    ]


def _nest(
    n: str, rows: tuple[str, str], columns: tuple[str, str], by: int, body: Sequence[str],
    after: str,
) -> list[str]:  # fmt: skip
    """Loops over rows `%r` and columns `%c` around a body, in whose names `$` is `n`."""
    lines = [
        "  br label %$.begin",
        "$.begin:",
        "  br label %$.row",
        "$.row:",
        f"  %$.r = phi i64 [ {rows[0]}, %$.begin ], [ %$.r1, %$.end ]",
        f"  %$.more = icmp slt i64 %$.r, {rows[1]}",
        f"  br i1 %$.more, label %$.enter, label %{after}",
        "$.enter:",
        "  br label %$.column",
        "$.column:",
        f"  %$.c = phi i64 [ {columns[0]}, %$.enter ], [ %$.c1, %$.do ]",
        f"  %$.on = icmp slt i64 %$.c, {columns[1]}",
        "  br i1 %$.on, label %$.do, label %$.end",
        "$.do:",
        *body,
        f"  %$.c1 = add i64 %$.c, {by}",
        "  br label %$.column",
        "$.end:",
        f"  %$.r1 = add i64 %$.r, {by}",
        "  br label %$.row",
    ]
    return [line.replace("$", n) for line in lines]


def _one(element: str) -> list[str]:
    return [
        f"  %$.get = getelementptr {element}, ptr %src, i64 %$.from",
        f"  %$.x = load {element}, ptr %$.get, align {int(element[1:]) // 8}",
        f"  %$.put = getelementptr {element}, ptr %dst, i64 %$.to",
        f"  store {element} %$.x, ptr %$.put, align {int(element[1:]) // 8}",
    ]


def _square(size: int, wide: int) -> list[str]:
    """A square of as many vectors as they have lanes."""
    lanes, element = wide // size, f"i{8 * size}"
    vector = f"<{lanes} x {element}>"
    out = []
    for i in range(lanes):
        out += [
            f"  %$.skip{i} = mul i64 %src_row, {i}",
            f"  %$.at{i} = add i64 %$.from, %$.skip{i}",
            f"  %$.get{i} = getelementptr {element}, ptr %src, i64 %$.at{i}",
            f"  %$.v{i} = load {vector}, ptr %$.get{i}, align {size}",
        ]
    lines, columns = _shuffled(lanes, LANE // size, vector)
    out += lines
    for j, name in enumerate(columns):
        out += [
            f"  %$.row{j} = mul i64 %dst_row, {j}",
            f"  %$.in{j} = add i64 %$.to, %$.row{j}",
            f"  %$.put{j} = getelementptr {element}, ptr %dst, i64 %$.in{j}",
            f"  store {vector} {name}, ptr %$.put{j}, align {size}",
        ]
    return out


def _shuffled(lanes: int, each: int, vector: str) -> tuple[list[str], list[str]]:
    """Shuffles of the vectors v0, v1... and the names of their columns: halves of 16 bytes are
    interleaved by elements, then by pairs of them; then vectors by 16 bytes.

    A value holds, of a number of rows, the columns in `held`: place p of the vector is row p % rows
    and column p // rows of those.
    """
    out: list[str] = []
    values = {(row, tuple(range(lanes))): f"%$.v{row}" for row in range(lanes)}
    rows = 1
    while rows < lanes:
        joined: dict[tuple[int, tuple[int, ...]], str] = {}
        for (first, held), name in values.items():
            if first // rows % 2:
                continue
            other = values[first + rows, held]
            for part, places in enumerate(_halves(rows, lanes, each)):
                new = f"%$.w{rows}_{first}_{held[0]}_{part}"
                mask = ", ".join(f"i32 {p}" for p in places)
                out.append(
                    f"  {new} = shufflevector {vector} {name}, {vector} {other},"
                    f" <{lanes} x i32> <{mask}>"
                )
                kept = tuple(held[p // rows] for p in places if p < lanes and p % rows == 0)
                joined[first, kept] = new
        values, rows = joined, 2 * rows
    columns = {held[0]: name for (_, held), name in values.items()}
    return out, [columns[c] for c in range(lanes)]


def _halves(rows: int, lanes: int, each: int) -> Iterator[list[int]]:
    """Of two vectors, which hold `rows` rows of columns, the places that two of twice as many do:
    the first or second columns of each 16 bytes, then those in even or odd ones."""
    runs = range(0, lanes, rows)
    for part in (0, 1):
        if rows < each:
            chosen = [p for p in runs if (p % each) // (each // 2) == part]
        else:
            chosen = [p for p in runs if (p // rows) % 2 == part]
        yield [p + side + r for p in chosen for side in (0, lanes) for r in range(rows)]
