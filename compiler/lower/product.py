"""A product as its kernels see it: its sizes, its place in the result, and where operands lie."""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.graph import Contract, Ref, flatten_index, split_index
from stagefuse.compiler.patterns.byte_operands import is_byte
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.frozen import frozen

from .expressions import product_of
from .values import Lowering


@frozen
class Product:
    """A product and its sizes; `stored`: what its panels are of."""

    ref: Ref
    primitive: Contract
    domain: tuple[Expr, ...]
    dtype: DType
    stored: DType
    rows: Expr
    columns: Expr
    panels: Expr
    row_tile: int
    operands: tuple[Ref, ...]

    @property
    def panel(self) -> int:
        return self.primitive.panel

    @property
    def depth(self) -> Expr:
        return self.primitive.depth

    @property
    def of_bytes(self) -> bool:
        """Whether its operands are of 8 bits."""
        return is_byte(self.stored)

    def tiled(self, low: Lowering, width: int) -> Product:
        """The same with the tiles of panels of a width."""
        schedule = low.schedule
        rows = schedule.byte_rows if self.of_bytes else schedule.row_tile[width]
        return replace(self, row_tile=rows)

    def width(self, panel: Expr) -> Expr:
        """The columns of a panel; fewer in the last, unless they are known to come out even."""
        known = self.columns.as_int()
        if known is not None and known % self.panel == 0:
            return const(self.panel)
        if known is not None and known < self.panel:
            return const(known)  # of the only one
        return minimum(self.columns - panel * self.panel, const(self.panel))

    @property
    def all_of_it(self) -> Depth:
        return Depth(const(0), self.depth)

    @property
    def batch(self) -> list[tuple[str, Expr]]:
        return [(f"d{a}", self.domain[a]) for a in self.primitive.batch]

    @property
    def lead(self) -> Expr:
        """The flat index of the batch."""
        return flatten_index([sym(n) for n, _ in self.batch], [e for _, e in self.batch])

    @property
    def base(self) -> Expr:
        """Where the matrix of the batch at hand begins in its buffer."""
        return self.primitive.base.substitute({f"i{x}": sym(f"d{x}") for x in self.primitive.batch})

    def place(self, low: Lowering, row: Expr, column: Expr) -> list[Expr]:
        """The position in the result of a row and a column of the matrix."""
        product, domain = self.primitive, self.domain
        at: dict[int, Expr] = {x: sym(f"d{x}") for x in product.batch}
        rows = split_index(row, [domain[x] for x in product.rows], low.facts)
        columns = split_index(column, [domain[x] for x in product.columns], low.facts)
        at.update(zip(product.rows, rows, strict=True))
        at.update(zip(product.columns, columns, strict=True))
        return [at.get(x, const(0)) for x in range(len(domain))]

    def result(self, low: Lowering) -> Matrix | None:
        """The rows and columns of the batch at hand in the result, if they lie as in a matrix there
        and the kernel stores nothing else. Rows of several unknown sizes do not, nor those of one
        that columns depend on too, nor a batch of unknown columns: that whole tiles stay in bounds
        is beyond what is proved."""
        group, axes = low.group, range(len(self.domain))
        if not low.schedule.direct or group.roots != [self.ref] or group.placed:
            return None
        unknown = self.rows.symbols()
        if len(unknown) > 1 or unknown & self.columns.symbols():
            return None
        if self.batch and self.columns.as_int() is None:
            return None
        inner = [*self.primitive.rows, *self.primitive.columns]
        long, last = ([x for x in xs if self.domain[x].as_int() != 1] for xs in (axes, inner))
        if long[len(long) - len(last) :] != last:
            return None
        outer = [sym(f"d{x}") if x in self.primitive.batch else const(0) for x in axes]
        return Matrix(
            low.buffer(self.ref, "out").name, flatten_index(outer, self.domain), self.columns
        )


def product_of_group(low: Lowering, anchor: int | None) -> Product:
    assert anchor is not None
    node = low.graph.nodes[anchor]
    primitive = node.primitive
    assert isinstance(primitive, Contract)
    domain = node.type.shape
    columns = product_of([domain[a] for a in primitive.columns])
    stored = low.graph.type(node.operands[1]).dtype
    found = Product(
        Ref(anchor), primitive, domain, node.type.dtype, stored,
        product_of([domain[a] for a in primitive.rows]), columns,
        floordiv(columns + (primitive.panel - 1), primitive.panel, low.facts), 0, node.operands,
    )  # fmt: skip
    return found.tiled(low, primitive.panel)


@frozen
class Depth:
    """A stretch of a product's sum. `packed`: the panels at hand hold no more than the stretch.
    `adds`: to what earlier stretches gave."""

    begin: Expr
    length: Expr
    packed: bool = False
    adds: bool = False


@frozen
class Matrix:
    """Rows of contiguous elements in a buffer or scratch: row i begins at start + i * step."""

    name: str
    start: Expr
    step: Expr


@frozen
class Panels:
    """Packed panels in a buffer or scratch: panel p begins at (first + p) * depth * width."""

    name: str
    first: Expr


@frozen
class Lines:
    """Panels in a buffer, not packed: row k of column c is at first + k * along + c * across."""

    name: str
    first: Expr
    along: Expr
    across: Expr
