"""Matrix products by tiles, each finished by what follows it while it is in cache."""

from __future__ import annotations

from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

from ..graph import (
    Contract,
    flatten_index,
    split_index,
)
from ..kernel_ir import (
    Alloc,
    Index,
    Load,
    TileProduct,
)
from .blocks import Parallel
from .expressions import at_least_one, product_of
from .values import Lowering


def lower_contract(low: Lowering) -> Parallel:
    assert low.group.anchor is not None
    node = low.graph.nodes[low.group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    domain = low.group.domain
    panel, row_tile = product.panel, low.schedule.row_tile[product.panel]
    block = row_tile * low.schedule.tiles_per_block
    rows = product_of([domain[a] for a in product.rows])
    columns = product_of([domain[a] for a in product.columns])
    panels = floordiv(columns + (panel - 1), panel, low.facts)
    batch = low.axes(product.batch)
    blocks = floordiv(rows + (block - 1), block, low.facts)
    groups = floordiv(panels + (low.schedule.panel_group - 1), low.schedule.panel_group, low.facts)
    parallel = [*batch, ("mb", blocks), ("nb", groups)]
    low.bind(parallel)
    dtype = node.type.dtype
    tile = low.name("tile")
    low.emit(Alloc(tile, dtype, (const(row_tile), const(panel))))
    a = low.buffer(node.operands[0], "in")
    packed = low.buffer(node.operands[1], "in")
    base = product.base.substitute({f"i{x}": sym(f"d{x}") for x in product.batch})
    lead = flatten_index([sym(n) for n, _ in batch], [e for _, e in batch])
    first = sym("mb") * block
    end = minimum(first + block, rows)
    panel_end = minimum(sym("nb") * low.schedule.panel_group + low.schedule.panel_group, panels)

    def one_tile() -> None:
        start = first + sym("t") * row_tile
        count = minimum(end - start, const(row_tile))
        low.emit(
            TileProduct(
                tile, const(0), const(panel), a.name, base + start * product.row_stride,
                product.row_stride, const(1), packed.name,
                (lead * panels + sym("p")) * product.depth * panel,
                count, product.depth, row_tile, panel,
            )
        )  # fmt: skip
        width = minimum(columns - sym("p") * panel, const(panel))
        low.loop("r", const(0), count, lambda: one_row(start, width))

    def one_row(start: Expr, width: Expr) -> None:
        low.facts = low.facts.with_ranges({"r": (0, row_tile - 1)})
        low.loop("c", const(0), width, lambda: element(start), vector=True)

    def element(start: Expr) -> None:
        low.tile = Load(tile, (Index(sym("r")), Index(sym("c"))), dtype)
        row = split_index(start + sym("r"), [domain[x] for x in product.rows], low.facts)
        column = split_index(
            sym("p") * panel + sym("c"), [domain[x] for x in product.columns], low.facts
        )
        at: dict[int, Expr] = {x: sym(f"d{x}") for x in product.batch}
        at.update(zip(product.rows, row, strict=True))
        at.update(zip(product.columns, column, strict=True))
        low.store([at.get(x, const(0)) for x in range(len(domain))])

    def all_tiles() -> None:
        low.loop("t", const(0), floordiv(end - first + (row_tile - 1), row_tile), one_tile)

    low.loop("p", sym("nb") * low.schedule.panel_group, panel_end, all_tiles)
    return parallel, at_least_one(product.depth) * (low.schedule.panel_group * panel)
