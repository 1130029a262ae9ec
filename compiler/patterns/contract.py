"""Finds matrix products: sums of a product whose factors depend on different axes.

Whatever was written (`@`, index notation, a convolution), the sum over K of u * v where u alone
varies along M, v alone along N, becomes one `Contract` of a strided matrix and packed panels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

from stagefuse.compiler.folded_views import folded_view
from stagefuse.compiler.graph import (
    Carried,
    Concat,
    Constant,
    Contract,
    Graph,
    Map,
    Node,
    Position,
    Reduce,
    Ref,
    Scalar,
    View,
    Weight,
    flatten_index,
)
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import BF16, F16, F32, F64, DType
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .operand_matrices import matrix_of, packed, stride_of, total_of, view_of
from .panel_width import has_many, panel_width, panels_time

LARGE = 1 << 15
"""Bytes of codes that are worth reading as they are."""
LESS_ZERO = (Map("cast"), Map("sub"))
"""What integers less their zeros are made of."""
FEW_PLACES = 16
"""Places of an image up to which a convolution has them as rows, and weights in the panels: a panel
of places would be mostly padding."""
WASTE, REPEATED = 1.12, 1.25
"""Where each element of the image is read but once, the same is so from this ratio of the times on:
having the places as rows costs a copy of them. From the second on where elements are read up to
MOST_READ times, as by 3 x 3 windows with a stride of two, and the result has MANY channels."""
MOST_READ, MANY = 2.5, 256
APART = 8
"""Steps between places from which on the image is copied element by element otherwise, as where it
is cut into patches: any ratio will do then."""
NARROW = 3
"""Products with fewer columns than this are plain reductions: a panel would be mostly padding. With
three columns or four and 5000 rows on a CPU, panels of 16 take a third of a reduction's time."""


@frozen
class Sums:
    """Sums of the product of two factors over a domain: `left` varies along the axes `rows`,
    `right` along `columns`, both along `batch` and, of which there are sums, along `depth`.
    `outer`: the axes of the result."""

    left: Ref
    right: Ref
    domain: tuple[Expr, ...]
    outer: tuple[int, ...]
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    depth: tuple[int, ...]

    def contract(self, base: Expr, row: Expr, width: int) -> Contract:
        """The product of a matrix whose rows begin at `base` and are `row` apart by panels of a
        width."""
        where = {axis: place for place, axis in enumerate(self.outer)}
        return Contract(
            tuple(where[x] for x in self.batch),
            tuple(where[x] for x in self.rows),
            tuple(where[x] for x in self.columns),
            total_of(self.domain, self.depth),
            base.substitute({f"i{x}": sym(f"i{where[x]}") for x in self.batch}),
            row,
            width,
        )


Finder = Callable[[Builder, Node, Sums], "Ref | None"]
"""Another form of sums, if there is one: the value of the node that they are the result of."""


@frozen
class Rules:
    """What products are made of. With `few_places`, convolutions of few places have them as rows.
    What `finder` finds goes before products of f32 and f64. With `single_rows`, a row times a
    matrix is a product too. `panel`: the columns of all panels of f32 and f64."""

    few_places: bool = True
    finder: Finder | None = None
    single_rows: bool = False
    panel: int | None = None


def rebuild(graph: Graph, rules: Rules, single: Set[int] = frozenset()) -> Graph:
    """The graph with chains of views folded into one and products found; meaning unchanged.
    Sums that are in `single` may be products of one row."""
    builder = Builder(graph.facts)
    new: dict[Ref, Ref] = {}
    for node in graph.nodes.values():
        operands = [new[ref] for ref in node.operands]
        with builder.at(node.span, node.stack, node.label):
            made = folded_view(builder, node, operands)
            own = replace(rules, single_rows=node.id in single)
            made = made or _product(builder, node, operands, own)
            made = made or builder.add(node.primitive, operands, node.types)
        new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
    builder.graph.results = tuple(new[ref] for ref in graph.results)
    return builder.graph.live()


def axes_of(graph: Graph, ref: Ref) -> frozenset[int]:
    """The axes of the domain along which a factor varies."""
    node = graph.nodes[ref.node]
    if isinstance(node.primitive, View):
        used = frozenset[str]().union(
            *(e.symbols() for e in (*node.primitive.indices, *node.primitive.guard))
        )
        return frozenset(n for n, s in enumerate(node.primitive.symbols) if s in used)
    if node.primitive in LESS_ZERO and node.type.dtype.is_int:
        return frozenset[int]().union(*(axes_of(graph, x) for x in node.operands))
    return frozenset(n for n, d in enumerate(node.type.shape) if d.as_int() != 1)


@frozen
class _Sides:
    """The factors of a product as its left and right one, and the axes along which each varies.
    `last`: the one along which elements of a panel lie. `places`: rows are those of images."""

    left: Ref
    right: Ref
    left_axes: frozenset[int]
    right_axes: frozenset[int]
    last: int
    places: bool


def _product(
    b: Builder, node: Node, operands: Sequence[Ref], rules: Rules
) -> tuple[Ref, ...] | None:
    """The result of sums of products by another node; None where they are no matrix product."""
    reduce = node.primitive
    if not isinstance(reduce, Reduce) or reduce.kind != "sum":
        return None
    dtype, summed = node.type.dtype, b.type(operands[0])
    if summed.dtype.kind != dtype.kind or not (dtype.is_float or rules.finder):
        return None
    factors = factors_of(b, operands[0])
    if factors is None or any(summed.shape[a].as_int() == 0 for a in reduce.axes):
        return None
    outer = [a for a in range(len(summed.shape)) if a not in reduce.axes]
    long = [a for a, size in enumerate(summed.shape) if size.as_int() != 1]
    if not set(long) & set(outer) or not set(long) & set(reduce.axes):
        return None
    sides = _sides(b, factors, summed.shape, outer, long, rules.few_places)
    repeated = [a for a in outer if a in long and a not in sides.left_axes | sides.right_axes]
    if repeated:
        return _repeated(b, node, (sides.left, sides.right), repeated, rules)
    sums = _sums(b, sides, summed.shape, outer, long, rules.single_rows)
    if sums is None:
        return None
    found = None if rules.finder is None else rules.finder(b, node, sums)
    if found is not None:
        return (found,)
    if not dtype.is_float or summed.dtype != dtype:
        return None
    return (_plain(b, node, sums, sides.places, rules.panel),)


def _sides(
    b: Builder, factors: tuple[Ref, Ref], domain: Sequence[Expr], outer: Sequence[int],
    long: Sequence[int], few_places: bool,
) -> _Sides:  # fmt: skip
    """The right factor is the one that varies along the last of the result's long axes, or else
    the constant one of two if few places of an image would be the columns."""
    last = max(a for a in outer if a in long)
    u, v = factors
    if last in axes_of(b.graph, u):
        u, v = v, u
    left, right = axes_of(b.graph, u), axes_of(b.graph, v)
    depth = set(long).difference(outer)
    rows, columns = (left - right) - depth, (right - left) - depth
    if few_places and _has_few_places(b, (u, v), domain, rows, columns):
        return _Sides(v, u, right, left, max(left - right), True)
    return _Sides(u, v, left, right, last, False)


def _sums(
    b: Builder, s: _Sides, domain: tuple[Expr, ...], outer: Sequence[int], long: Sequence[int],
    single_rows: bool,
) -> Sums | None:  # fmt: skip
    """The sums with axes told apart; None where they are better reduced as they are."""
    left, right = s.left_axes, s.right_axes
    depth = tuple(a for a in long if a not in outer)
    if not left & right >= set(depth) or s.last in left or s.last not in right:
        return None
    rows = tuple(a for a in outer if a in left - right)
    columns = tuple(a for a in outer if a in right - left)
    batch = tuple(a for a in outer if a in left & right)
    if not columns or not (rows or single_rows or is_quantised(b.graph, s.right)):
        return None
    narrow = total_of(domain, columns).as_int()
    if narrow is not None and narrow < NARROW:
        return None
    return Sums(s.left, s.right, domain, tuple(outer), batch, rows, columns, depth)


def _plain(b: Builder, node: Node, s: Sums, places: bool, panel: int | None) -> Ref:
    """The product in f32 or f64. `places`: its rows are those of images; `panel`: as of `Rules`."""
    dtype = F64 if node.type.dtype == F64 else F32
    only = panel if has_many(total_of(s.domain, s.rows)) else None
    width = panel_width(total_of(s.domain, s.columns), only)
    right = cast_of(b, s.right, dtype)
    panels = packed(b, right, s.domain, s.batch, s.columns, s.depth, width)
    turned = _is_turned(b, s, s.rows if places else s.rows[-1:])
    left = s.left if turned else cast_of(b, s.left, dtype)
    a, base, row = matrix_of(b, left, s.domain, s.batch, s.rows, s.depth)
    a = b.cast(a, dtype)
    type = node.type.with_dtype(dtype)
    (product,) = b.add(s.contract(base, row, width), (a, panels), (type,))
    return b.result(product, node.type.dtype)


def _is_turned(b: Builder, s: Sums, adjacent: Sequence[int]) -> bool:
    """Whether 16-bit elements are adjacent along these axes of the rows, and not along the depth:
    they are copied as they are stored, so that a product of 16 bits has them."""
    node = b.graph.nodes[s.left.node]
    view, source = node.primitive, b.type(s.left).dtype
    if source not in (F16, BF16) or not isinstance(view, View) or view.guard or not s.rows:
        return False
    offset = flatten_index(view.indices, b.type(node.operands[0]).shape)
    along = stride_of(b, offset, s.domain, s.depth)
    return along not in (None, const(1)) and stride_of(b, offset, s.domain, adjacent) == const(1)


def _has_few_places(
    b: Builder, factors: tuple[Ref, Ref], domain: Sequence[Expr], left: Set[int], right: Set[int]
) -> bool:
    """Whether the left factor is constant, as weights are, and few places of an image are in a row
    of the result."""
    if not left or not right or not _is_constant(b.graph, factors[0]):
        return False
    rows = total_of(domain, sorted(left))
    places = total_of(domain, [a for a in right if a > max(left)])
    most, least = b.facts.bounds(places)[1], b.facts.bounds(rows)[0]
    if most is not None and most <= FEW_PLACES and least is not None and least > FEW_PLACES:
        return True
    down, across = rows.as_int(), places.as_int()
    if not down or not across:
        return False
    ratio = panels_time(across) * down / (panels_time(down) * across)
    if reads_once(b, factors[1], domain):
        return ratio > (1 if _are_apart(b, factors[1], right) else WASTE)
    return ratio > REPEATED and down >= MANY and reads_once(b, factors[1], domain, MOST_READ)


def _are_apart(b: Builder, factor: Ref, places: Set[int]) -> bool:
    """Whether places next to each other lie far from each other in an image."""
    view = b.graph.nodes[factor.node].primitive
    if not isinstance(view, View):
        return False
    steps = (view.indices[-1].coefficient(view.symbols[a]) for a in places)
    return any(step is not None and (step.as_int() or 0) >= APART for step in steps)


def reads_once(b: Builder, factor: Ref, domain: Sequence[Expr], most: float = 1) -> bool:
    """Whether a factor has no more elements than what it is a view of, or as many times as `most`.
    """
    node = b.graph.nodes[factor.node]
    if not isinstance(node.primitive, View):
        return True
    shape = b.type(node.operands[0]).shape
    stored = total_of(shape, range(len(shape)))
    read = total_of(domain, sorted(axes_of(b.graph, factor)))
    if most > 1:
        return (read.as_int() or 1 << 62) <= most * (stored.as_int() or 0)
    return b.facts.is_nonneg(stored - read)


def _is_constant(graph: Graph, ref: Ref) -> bool:
    """Whether a value follows from weights and constants alone."""
    found = _sources(graph, ref, (Map, View))
    return all(isinstance(node.primitive, Weight | Constant | Scalar) for node in found)


def is_quantised(graph: Graph, ref: Ref) -> bool:
    """Whether a value is a pointwise function of constants alone, a large one of them in 8 bits or
    fewer. A product of a single row by them is one too: panels can stay codes."""
    found = _sources(graph, ref, (Map, View, Concat))
    stored = [node for node in found if isinstance(node.primitive, Weight | Constant)]
    made = [node for node in found if isinstance(node.primitive, Scalar | Position)]
    return len(stored) + len(made) == len(found) and any(map(_is_large_and_narrow, stored))


def _is_large_and_narrow(node: Node) -> bool:
    size = total_of(node.type.shape, range(node.type.rank)).as_int() or 0
    return node.type.dtype.bits <= 8 and not node.type.dtype.is_bool and size >= LARGE


def _sources(graph: Graph, ref: Ref, kinds: tuple[type, ...]) -> list[Node]:
    """The nodes of other kinds from which nodes of some kinds make a value, each once."""
    seen, pending, found = {ref.node}, [ref.node], []
    while pending:
        node = graph.nodes[pending.pop()]
        if not isinstance(node.primitive, kinds):
            found.append(node)
            continue
        fresh = {operand.node for operand in node.operands} - seen
        seen |= fresh
        pending += sorted(fresh)
    return found


def _repeated(
    b: Builder,
    node: Node,
    factors: tuple[Ref, Ref],
    axes: Sequence[int],
    rules: Rules,
) -> tuple[Ref, ...] | None:
    """A product that is the same along some axes: found without them, and then repeated."""
    reduce = node.primitive
    assert isinstance(reduce, Reduce)
    domain = b.type(factors[0]).shape
    rest = [a for a in range(len(domain)) if a not in axes]

    def place(*at: Expr) -> list[Expr]:
        return [at[rest.index(a)] if a in rest else const(0) for a in range(len(domain))]

    u, v = (view_of(b, x, [domain[a] for a in rest], place, None) for x in factors)
    unfolded = zip(factors, (b.graph.nodes[x.node].operands for x in (u, v)), strict=True)
    if any(x in operands for x, operands in unfolded):
        return None  # there may be no first element along those axes
    whole = b.map("mul", u, v)
    total = b.reduce("sum", whole, [rest.index(a) for a in reduce.axes], node.type.dtype)
    found = _product(b, b.graph.nodes[total.node], (whole,), rules)
    if found is None:
        return None
    outer = [a for a in range(len(domain)) if a not in reduce.axes]
    return (
        b.view(found[0], node.type.shape, lambda *at: [
            i for i, a in zip(at, outer, strict=True) if a in rest
        ]),
    )  # fmt: skip


def factors_of(b: Builder, ref: Ref) -> tuple[Ref, Ref] | None:
    """The two factors of a product of elements, through a view of it that leaves nothing out.

    Sums over axes of size 1 have such a view: those of a convolution with a kernel of 1 x 1.
    """
    node = b.graph.nodes[ref.node]
    if node.primitive == Map("mul"):
        return _below(b, node.operands[0]), _below(b, node.operands[1])
    if not isinstance(node.primitive, View) or node.primitive.guard:
        return None
    product = b.graph.nodes[node.operands[0].node]
    if product.primitive != Map("mul"):
        return None
    first, second = (through(b, node, _below(b, factor)) for factor in product.operands)
    return first, second


def _below(b: Builder, factor: Ref) -> Ref:
    """A factor; where it is a converted view, as a view of what is converted."""
    node = b.graph.nodes[factor.node]
    if node.primitive != Map("cast"):
        return factor
    view = b.graph.nodes[node.operands[0].node]
    if not isinstance(view.primitive, View) or view.primitive.guard:
        return factor
    return _under(b, view, node.type.dtype)


def through(b: Builder, view: Node, factor: Ref) -> Ref:
    """A factor seen through the view of the product."""
    type = TensorType(b.type(factor).dtype, view.type.shape)
    (made,) = b.add(view.primitive, (factor,), (type,))
    folded = folded_view(b, b.graph.nodes[made.node], (factor,))
    return folded[0] if folded else made


def cast_of(b: Builder, x: Ref, dtype: DType) -> Ref:
    """x in a dtype; of a view, what it looks at, so that what is repeated is converted once."""
    node = b.graph.nodes[x.node]
    if not isinstance(node.primitive, View) or node.type.dtype == dtype:
        return b.cast(x, dtype)
    return _under(b, node, dtype)


def _under(b: Builder, node: Node, dtype: DType) -> Ref:
    """A view of what it looks at in a dtype: of what a recurrence carries, the half of its step, as
    the other is not defined at first."""
    view, (source,) = node.primitive, node.operands
    assert isinstance(view, View)
    if isinstance(b.graph.nodes[source.node].primitive, Carried):
        _, *shape = b.type(source).shape
        symbols = b.symbols(len(shape))
        half = View(symbols, (view.indices[0], *map(sym, symbols)))
        (source,) = b.add(half, (source,), (TensorType(b.type(source).dtype, tuple(shape)),))
        view = replace(view, indices=view.indices[1:])
    type = node.type.with_dtype(dtype)
    return b.add(view, (b.cast(source, dtype),), (type,))[0]
