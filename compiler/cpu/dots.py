"""Products by a panel whose columns lie apart and whose rows are adjacent, as LLVM IR.

Each element of the result is the dot product of two stretches of memory. Vectors run along the
depth; the partial sums of some rows by some columns are in registers, and in the end added up
across their lanes, those of all elements together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from .tile import REGISTERS
from .tile_sums import SUFFIX, WIDTH

COLUMNS = 4
HEIGHTS: dict[str, dict[int, tuple[int, ...]]] = {
    "v3": {COLUMNS: (2, 1), 1: (8, 2, 1)},
    "v4": {COLUMNS: (4, 2, 1), 1: (8, 2, 1)},
}
"""Rows that are done together, by columns: so many sums, and what is multiplied, fit registers."""


def symbol(element: str) -> str:
    return f"sf.dots.{SUFFIX[element]}"


def dots_text(element: str, level: str) -> str:
    """The function `symbol(dst, dst_row, a, a_row, panel, step, rows, depth, width, add)`: as
    `tile.tile_text`'s, where column c of the panel begins at c * step."""
    shapes = [(rows, columns) for columns in (COLUMNS, 1) for rows in HEIGHTS[level][columns]]
    parts = [_Block(element, level, *shape).text() for shape in shapes]
    return "\n\n".join([_driver(element, level), *parts])


def _driver(element: str, level: str) -> str:
    out = [
        f"define void @{symbol(element)}(ptr noalias %dst, i64 %dst_row, ptr readonly %a,"
        " i64 %a_row, ptr noalias readonly %panel, i64 %step, i64 %rows, i64 %depth, i64 %width,"
        " i1 %add) noinline noduplicate nounwind {",
        "entry:",
        "  br label %c4",
    ]
    before = "entry"
    for columns in (COLUMNS, 1):
        n = f"c{columns}"
        first = "0" if before == "entry" else "%c4.at"
        after = "c1" if columns == COLUMNS else "return"
        out += [
            f"{n}:",
            f"  %{n}.at = phi i64 [ {first}, %{before} ], [ %{n}.on, %{n}.latch ]",
            f"  %{n}.on = add i64 %{n}.at, {columns}",
            f"  %{n}.fits = icmp sle i64 %{n}.on, %width",
            f"  br i1 %{n}.fits, label %{n}.rows, label %{after}",
            f"{n}.rows:",
            f"  %{n}.skip = mul i64 %{n}.at, %step",
            f"  %{n}.panel = getelementptr {element}, ptr %panel, i64 %{n}.skip",
            f"  %{n}.dst = getelementptr {element}, ptr %dst, i64 %{n}.at",
            f"  br label %{n}.r{HEIGHTS[level][columns][0]}",
            *_rows(element, level, columns),
            f"{n}.latch:",
            f"  br label %{n}",
        ]
        before = n
    return "\n".join([*out, "return:", "  ret void", "}"])


def _rows(element: str, level: str, columns: int) -> list[str]:
    """The loops over rows, the highest blocks first."""
    out, before, first = [], f"c{columns}.rows", "0"
    for place, rows in enumerate(heights := HEIGHTS[level][columns]):
        n = f"c{columns}.r{rows}"
        last = place == len(heights) - 1
        after = f"c{columns}.latch" if last else f"c{columns}.r{heights[place + 1]}"
        out += [
            f"{n}:",
            f"  %{n}.at = phi i64 [ {first}, %{before} ], [ %{n}.on, %{n}.do ]",
            f"  %{n}.on = add i64 %{n}.at, {rows}",
            f"  %{n}.fits = icmp sle i64 %{n}.on, %rows",
            f"  br i1 %{n}.fits, label %{n}.do, label %{after}",
            f"{n}.do:",
            f"  %{n}.a_skip = mul i64 %{n}.at, %a_row",
            f"  %{n}.a = getelementptr {element}, ptr %a, i64 %{n}.a_skip",
            f"  %{n}.d_skip = mul i64 %{n}.at, %dst_row",
            f"  %{n}.d = getelementptr {element}, ptr %c{columns}.dst, i64 %{n}.d_skip",
            f"  call void @{symbol(element)}.{rows}x{columns}(ptr %{n}.d, i64 %dst_row,"
            f" ptr %{n}.a, i64 %a_row, ptr %c{columns}.panel, i64 %step, i64 %depth, i1 %add)",
            f"  br label %{n}",
        ]
        before, first = n, f"%{n}.at"
    return out


class _Block:
    """The function for some rows by some columns."""

    def __init__(self, element: str, level: str, rows: int, columns: int) -> None:
        self.element, self.rows, self.columns = element, rows, columns
        self.lanes, self.size = REGISTERS[level][1] // WIDTH[element], WIDTH[element]
        self.vector = f"<{self.lanes} x {element}>"
        self.suffix = f"v{self.lanes}f{8 * self.size}"
        self.cells = [(r, c) for r in range(rows) for c in range(columns)]

    def text(self) -> str:
        lanes = ", ".join(f"i64 {lane}" for lane in range(self.lanes))
        return "\n".join(
            [
                f"define internal void @{symbol(self.element)}.{self.rows}x{self.columns}("
                "ptr noalias %dst, i64 %dst_row, ptr readonly %a, i64 %a_row,"
                " ptr noalias readonly %panel, i64 %step, i64 %depth, i1 %add)"
                " noinline nounwind {",
                "entry:",
                *self._starts(),
                f"  %whole = and i64 %depth, {-self.lanes}",
                "  %any = icmp sgt i64 %whole, 0",
                "  br i1 %any, label %loop, label %rest",
                "loop:",
                "  %k = phi i64 [ 0, %entry ], [ %k1, %loop ]",
                *self._phis("s", "zeroinitializer", "entry", "n", "loop"),
                *self._step("%k", "", "s", "n"),
                f"  %k1 = add nuw nsw i64 %k, {self.lanes}",
                "  %more = icmp slt i64 %k1, %whole",
                "  br i1 %more, label %loop, label %rest",
                "rest:",
                *self._phis("t", "zeroinitializer", "entry", "n", "loop"),
                "  %left = sub i64 %depth, %whole",
                "  %part = icmp sgt i64 %left, 0",
                "  br i1 %part, label %tail, label %reduce",
                "tail:",
                f"  %left.in = insertelement <{self.lanes} x i64> poison, i64 %left, i64 0",
                f"  %lefts = shufflevector <{self.lanes} x i64> %left.in,"
                f" <{self.lanes} x i64> poison, <{self.lanes} x i32> zeroinitializer",
                f"  %mask = icmp sgt <{self.lanes} x i64> %lefts, <{lanes}>",
                *self._step("%whole", "%mask", "t", "u"),
                "  br label %reduce",
                "reduce:",
                *self._phis("v", "t", "rest", "u", "tail"),
                *self._reduced(),
                "  ret void",
                "}",
            ]
        )

    def _starts(self) -> list[str]:
        """Where the rows and the columns begin."""
        out = []
        for name, base, step, most in (
            ("a", "%a", "%a_row", self.rows), ("p", "%panel", "%step", self.columns),
        ):  # fmt: skip
            for n in range(most):
                out += [
                    f"  %{name}{n}.skip = mul i64 {step}, {n}",
                    f"  %{name}{n} = getelementptr {self.element}, ptr {base}, i64 %{name}{n}.skip",
                ]
        return out

    def _phis(self, name: str, first: str, entry: str, last: str, latch: str) -> list[str]:
        """The sums `name` where two blocks meet; `first` of one are names too, or all a value."""
        out = []
        for r, c in self.cells:
            begun = first if len(first) > 1 else f"%{first}{r}_{c}"
            out.append(
                f"  %{name}{r}_{c} = phi {self.vector} [ {begun}, %{entry} ],"
                f" [ %{last}{r}_{c}, %{latch} ]"
            )
        return out

    def _step(self, k: str, mask: str, old: str, new: str) -> list[str]:
        """A vector of each row times one of each column."""
        out = []
        for name, most in (("a", self.rows), ("p", self.columns)):
            for n in range(most):
                at = f"%{new}.{name}{n}"
                out.append(f"  {at}.at = getelementptr {self.element}, ptr %{name}{n}, i64 {k}")
                out.append(f"  {at} = {self._load(f'{at}.at', mask)}")
        for r, c in self.cells:
            out.append(
                f"  %{new}{r}_{c} = call {self.vector} @llvm.fma.{self.suffix}({self.vector}"
                f" %{new}.a{r}, {self.vector} %{new}.p{c}, {self.vector} %{old}{r}_{c})"
            )
        return out

    def _load(self, at: str, mask: str) -> str:
        if not mask:
            return f"load {self.vector}, ptr {at}, align {self.size}"
        return (
            f"call {self.vector} @llvm.masked.load.{self.suffix}.p0(ptr align {self.size} {at},"
            f" <{self.lanes} x i1> {mask}, {self.vector} zeroinitializer)"
        )

    def _reduced(self) -> list[str]:
        """Sums across lanes, and their stores, as many rows at a time as a vector has room for."""
        out = []
        together = min(self.rows, max(1, self.lanes // self.columns))
        for first in range(0, self.rows, together):
            cells = [(r, c) for r, c in self.cells if first <= r < first + together]
            lines, total = self._across(f"x{first}", [f"%v{r}_{c}" for r, c in cells])
            out += lines
            for r in range(first, first + together):
                out += self._stored(r, (r - first) * self.columns, total, len(cells))
        return out

    def _across(self, name: str, vectors: Sequence[str]) -> tuple[list[str], str]:
        """A vector of the sums of the lanes of each of some vectors, no more than lanes: pairs of
        lanes are added until one is left of each."""
        out: list[str] = []
        lanes, wanted, found, numbers = self.lanes, len(vectors), list(vectors), count()
        while lanes * len(found) > wanted:
            pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
            size, found = lanes * len(pairs[0]) // 2, []
            for u, *v in pairs:
                to = f"%{name}.{next(numbers)}"
                kind, other = f"<{lanes} x {self.element}>", v[0] if v else "poison"
                for which in (0, 1):
                    places = ", ".join(f"i32 {which + 2 * i}" for i in range(size))
                    out.append(
                        f"  {to}.{which} = shufflevector {kind} {u}, {kind} {other},"
                        f" <{size} x i32> <{places}>"
                    )
                out.append(f"  {to} = fadd <{size} x {self.element}> {to}.0, {to}.1")
                found.append(to)
            lanes = size
        return out, found[0]

    def _stored(self, row: int, place: int, total: str, lanes: int) -> list[str]:
        """Stores the sums of a row, which lie in a vector of some lanes from a place on."""
        n, kind = f"%y{row}", f"<{self.columns} x {self.element}>"
        places = ", ".join(f"i32 {place + c}" for c in range(self.columns))
        whole = f"<{lanes} x {self.element}>"
        return [
            f"  {n}.sum = shufflevector {whole} {total}, {whole} poison,"
            f" <{self.columns} x i32> <{places}>",
            f"  {n}.skip = mul i64 %dst_row, {row}",
            f"  {n}.at = getelementptr {self.element}, ptr %dst, i64 {n}.skip",
            f"  {n}.old = load {kind}, ptr {n}.at, align {self.size}",
            f"  {n}.from = select i1 %add, {kind} {n}.old, {kind} zeroinitializer",
            f"  {n}.new = fadd {kind} {n}.sum, {n}.from",
            f"  store {kind} {n}.new, ptr {n}.at, align {self.size}",
        ]
