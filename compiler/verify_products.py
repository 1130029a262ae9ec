"""What the statement of a matrix product must satisfy; the numbers are those of `kernel_verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import BF16, F16, F32, F64, I32, I64

from .kernel_ir import Buffer, Checked, TileProduct
from .patterns.byte_operands import is_byte
from .proofs.bounds import size_of

if TYPE_CHECKING:
    from .kernel_verify import Check, Scope


def tile_product(check: Check, s: TileProduct, scope: Scope) -> None:
    dst, a = (check.buffer(scope, name) for name in (s.dst, s.a))
    panel = None if s.element is not None else check.buffer(scope, s.panel)
    if dst.mode == "in":
        check.fail(5, f"`{dst.name}` is only read")
    other = a.dtype if panel is None else panel.dtype
    bytes_ = is_byte(a.dtype) and is_byte(other) and a.dtype.is_float == other.is_float
    wide = a.dtype
    if a.dtype in (F16, BF16) or bytes_:
        wide = F32 if a.dtype.is_float else I32
    if (a.dtype != other and not bytes_) or dst.dtype != wide or wide not in (F32, F64, I32):
        check.fail(
            7, "a product is of f32, f64 or i32, or of 16- or 8-bit operands into f32 or i32"
        )
    if panel is None and (dst.dtype != F32 or is_byte(a.dtype)):
        check.fail(7, "a product by elements that are computed is one of 16 bits or f32 into f32")
    scope = _choosing(check, s, scope)
    for expr in (s.dst_offset, s.dst_row, s.a_offset, s.a_row, s.a_col, s.panel_offset, s.rows,
                 s.depth):  # fmt: skip
        check.symbols(scope, expr)
    for wanted in (s.width, s.panel_row, s.panel_col):
        if wanted is not None:
            check.symbols(scope, wanted)
    if s.element is not None:
        inner = scope.inner()
        for name, extent in ((s.k, s.depth), (s.c, const(s.nr))):
            check.bind(inner, name)
            inner.enter_loop(name, const(0), extent)
        check.typed(s.element, inner, F32, "an element of a panel")
    if panel is not None and s.panel_place is not None:
        inner = scope.inner()
        inner.enter_loop("k", const(0), s.depth)
        check.symbols(inner, s.panel_place)
        place = s.panel_offset + s.panel_place
        for index in (place, place + (s.nr - 1)):
            check.inside(panel.name, index, size_of(panel.shape), inner, (s.rows - 1,))
    if check.bounds.broken(s.mr - s.rows, scope.facts, scope.guards, check.text) is not None:
        check.fail(7, f"{s.rows} rows may be more than {s.mr}")
    some = (s.rows - 1, s.depth - 1)
    last = (s.rows - 1, s.depth - 1)
    ends = [(dst, s.dst_offset, s.dst_offset + last[0] * s.dst_row + s.nr - 1)]
    if panel is not None:
        ends.append((panel, s.panel_offset, s.panel_offset + _panel_end(s)))
    if s.a_indices:
        _gathered(check, s, a, scope)
    else:
        ends.append((a, s.a_offset, s.a_offset + last[0] * s.a_row + last[1] * s.a_col))
    for buffer, first, end in ends:
        for index in (first, end):
            check.inside(buffer.name, index, size_of(buffer.shape), scope, some)


def _choosing(check: Check, s: TileProduct, scope: Scope) -> Scope:
    """The scope of a product, in which positions from data have names."""
    if not s.chosen and not s.positions:
        return scope
    found, inner = scope.inner(), scope.inner()
    inner.enter_loop("i", const(0), s.rows)
    if len(s.chosen) != len(s.positions):
        check.fail(7, f"{len(s.chosen)} names stand for {len(s.positions)} positions")
    for name, value in zip(s.chosen, s.positions, strict=True):
        check.bind(found, name)
        if not isinstance(value, Checked):
            check.fail(7, "a position from data is not checked")
            break
        check.typed(value, inner, I64, "a position")
        check.inside(name, const(0), value.extent, scope, ())
        found.indices |= {name}
        found.facts = found.facts.with_ranges({name: (0, value.extent - 1)})
    return found


def _gathered(check: Check, s: TileProduct, a: Buffer, scope: Scope) -> None:
    """A left operand that is no matrix: in bounds, and a sum of parts of the row and the depth."""
    inner = scope.inner()
    inner.enter_loop("i", const(0), s.rows)
    inner.enter_loop("k", const(0), s.depth)
    for expr in (*s.a_indices, *s.a_guard):
        check.symbols(inner, expr)
        if "i" in (expr - expr.substitute({"k": 0})).symbols():
            check.fail(7, f"{expr} is no sum of parts of i and of k")
    if len(s.a_indices) != len(a.shape):
        check.fail(4, f"`{a.name}` has {len(a.shape)} axes, not {len(s.a_indices)}")
    ends = (s.rows - 1 - sym("i"), s.depth - 1 - sym("k"))
    for index, extent in zip(s.a_indices, a.shape, strict=True):
        check.inside(a.name, index, extent, inner, (*s.a_guard, *ends))


def _panel_end(s: TileProduct) -> Expr:
    """The last element of a panel in steps, from its first."""
    if s.panel_place is not None:
        return const(0)
    if s.panel_row is None or s.panel_col is None:
        return s.depth * s.nr - 1
    return (s.depth - 1) * s.panel_row + ((s.width or const(s.nr)) - 1) * s.panel_col
