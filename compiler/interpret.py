"""The reference interpreter: what a dataflow graph means, in NumPy.

Floats are float64 throughout. With `wide` only casts, scalars and inputs round, so that the
result is nearly exact; without it each operation rounds to its dtype. Integers are exact. It
shares no code with the backends but the index expressions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagefuse.dsl.dims import Atom, Expr
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.numpy_later import np

from . import scalar
from .graph import (
    Carried,
    Concat,
    Constant,
    Contract,
    Gather,
    Graph,
    Indirect,
    Input,
    Map,
    Node,
    Position,
    Recurrence,
    Reduce,
    Ref,
    Scalar,
    Scan,
    Scatter,
    Sort,
    State,
    Update,
    View,
    Weight,
    Within,
)
from .recurrence import Nests
from .scalar import Array, highest, lowest, round_to, wide

Values = Mapping[str, Any]


@dataclass
class OutOfRange(IndexError):
    """An index read from data that is outside its axis: which node, what it was, the extent."""

    node: Node
    value: int
    extent: int

    def __str__(self) -> str:
        place = "" if self.node.span is None else f" at {self.node.span}"
        return f"index {self.value} is out of range for an axis of size {self.extent}{place}"


def evaluate(
    graph: Graph,
    inputs: Mapping[str, Array],
    dims: Mapping[str, int],
    wide: bool = True,
    weights: Mapping[tuple[str, str], Array] | None = None,
    states: Mapping[str, Array] | None = None,
) -> list[Array]:
    """The graph's results: float64 for floats, their own dtype for the rest.

    `dims` binds every dimension variable; `weights` is by (file name in the source, key).
    `states` are what a session keeps, before the call. Raises OutOfRange for an index out of range.
    """
    return _Run(graph, inputs, dims, wide, weights or {}, states or {}).results()


def evaluate_node(graph: Graph, node: Node, operands: Sequence[Array]) -> list[Array]:
    """The results of one node of known shape, each rounded to its dtype: floats in float64, or as
    the operands have them where elements are only moved."""
    run = _Run(Graph(graph.facts), {}, {}, False, {}, {})
    given = [np.asarray(a) for a in operands]
    if _moves(node) and len({a.dtype for a in given}) == 1:
        return list(run.node(node, given))
    found = run.node(node, [wide(a) for a in given])
    return [run.finish(a, t.dtype) for a, t in zip(found, node.types, strict=True)]


def _moves(node: Node) -> bool:
    """Whether each element of the result is one of an operand's."""
    p = node.primitive
    return isinstance(p, Concat) or (isinstance(p, View) and not p.guard)


def index_values(expr: Expr, values: Values) -> Any:
    """An expression over integers and integer arrays, broadcast together."""
    total: Any = 0
    for monomial, coefficient in expr.terms:
        product: Any = coefficient
        for atom, power in monomial:
            factor = _atom(atom, values)
            for _ in range(power):
                product = product * factor
        total = total + product
    return total


def _atom(atom: Atom, values: Values) -> Any:
    if atom.kind == "sym":
        return values[atom.name]
    a, b = (index_values(arg, values) for arg in atom.args)
    if atom.kind == "min":
        return np.minimum(a, b)
    if atom.kind == "max":
        return np.maximum(a, b)
    safe = np.where(np.equal(b, 0), 1, b)
    found = np.floor_divide(a, safe) if atom.kind == "//" else np.mod(a, safe)
    return np.where(np.equal(b, 0), 0, found)


class _Run:
    """One evaluation: the values alive, and how many uses each still has."""

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, Array],
        dims: Mapping[str, int],
        wide: bool,
        weights: Mapping[tuple[str, str], Array],
        states: Mapping[str, Array],
    ) -> None:
        self.graph, self.inputs, self.dims = graph, inputs, dict(dims)
        self.wide, self.weights, self.states = wide, weights, states
        self.values: dict[Ref, Array] = {}
        self.left: dict[Ref, int] = {}
        for node in graph.nodes.values():
            for ref in node.operands:
                self.left[ref] = self.left.get(ref, 0) + 1
        for ref in graph.results:
            self.left[ref] = self.left.get(ref, 0) + 1
        self.products = self._products()
        self.nests = Nests(graph)
        self.bodies: dict[tuple[str, ...], list[Node]] = {}
        for node in graph.nodes.values():
            nest = self.nests.of(node.id)
            if isinstance(node.primitive, Carried):
                nest = nest[:-1]  # it starts before the first step
            self.bodies.setdefault(nest, []).append(node)
            if nest:  # what a step reads is needed at every step
                self.left.update({ref: self.left[ref] + 1 for ref in node.operands})

    def results(self) -> list[Array]:
        self._run(())
        return [self.values[ref] for ref in self.graph.results]

    def _run(self, nest: tuple[str, ...]) -> None:
        """Every node that is computed in these recurrences, and in those inside them."""
        for node in self.bodies.get(nest, ()):
            if node.id in self.products:
                continue
            if isinstance(node.primitive, Recurrence):
                found = self._steps(node, node.primitive, nest)
            else:
                found = self.node(node, [self.values[ref] for ref in self._operands(node)])
            for number, (array, type) in enumerate(zip(found, node.types, strict=True)):
                ref = Ref(node.id, number)
                if self.left.get(ref):
                    self.values[ref] = self.finish(array, type.dtype)
            for operand in self._operands(node) if not nest else ():
                self._release(operand)

    def _steps(self, node: Node, p: Recurrence, nest: tuple[str, ...]) -> tuple[Array, ...]:
        """The results of a recurrence, one step after the other."""
        count, held = p.count.evaluate(self.dims), node.operands[: p.carried]
        following = node.operands[p.carried : 2 * p.carried]
        gathered = node.operands[2 * p.carried :]
        shapes = [tuple(d.evaluate(self.dims) for d in t.shape) for t in node.types[p.carried :]]
        kept = [np.zeros(s, self._stored(r)) for s, r in zip(shapes, gathered, strict=True)]
        for step in range(count):
            self.dims[p.step] = step
            self._run((*nest, p.step))
            for ref, value in zip(held, following, strict=True):
                self.values[ref][(step + 1) % 2] = self.values[value]
            for array, value, place in zip(kept, gathered, p.places, strict=True):
                array[place.evaluate(self.dims)] = self.values[value]
        return (*(self.values[ref] for ref in held), *kept)

    def _stored(self, ref: Ref) -> Any:
        dtype = self.graph.type(ref).dtype
        return np.float64 if dtype.is_float else dtype.numpy

    def _products(self) -> frozenset[int]:
        """Products that only sums read: with wide values the sum computes both at once."""
        uses = self.graph.uses()
        results = {ref.node for ref in self.graph.results}
        found = set()
        for node in self.graph.nodes.values():
            readers = uses.get(Ref(node.id), [])
            summed = all(
                isinstance(p := self.graph.nodes[r].primitive, Reduce) and p.kind == "sum"
                for r in readers
            )
            is_product = node.primitive == Map("mul") and node.type.dtype.is_float
            if is_product and self.wide and summed and len(readers) == 1:
                if node.id not in results:
                    found.add(node.id)
        return frozenset(found)

    def _operands(self, node: Node) -> tuple[Ref, ...]:
        """The operands, those of a deferred product in its place."""
        if len(node.operands) == 1 and node.operands[0].node in self.products:
            return self.graph.nodes[node.operands[0].node].operands
        return node.operands

    def _release(self, ref: Ref) -> None:
        self.left[ref] -= 1
        if not self.left[ref]:
            self.values.pop(ref, None)  # a recurrence of no steps computes nothing

    def finish(self, array: Array, dtype: DType) -> Array:
        if dtype.is_float:
            array = np.asarray(array, np.float64)
            return array if self.wide else _sliced(lambda a: round_to(a, dtype), [array])
        return np.asarray(array, dtype.numpy)

    def _shape(self, node: Node) -> tuple[int, ...]:
        return tuple(d.evaluate(self.dims) for d in node.type.shape)

    def _grid(self, symbols: Sequence[str], shape: Sequence[int]) -> dict[str, Any]:
        """Dimensions, and each symbol as its positions along its own axis."""
        values: dict[str, Any] = dict(self.dims)
        for axis, (name, size) in enumerate(zip(symbols, shape, strict=True)):
            ones = (1,) * (len(shape) - axis - 1)
            values[name] = np.arange(size, dtype=np.int64).reshape((*(1,) * axis, size, *ones))
        return values

    def node(self, node: Node, args: Sequence[Array]) -> tuple[Array, ...]:
        """The results of a node for its operands' values, not yet rounded."""
        if isinstance(node.primitive, Sort):
            return sort(args[0], node.primitive.axis, node.primitive.descending)
        return (self._value(node, args),)

    def _value(self, node: Node, args: Sequence[Array]) -> Array:
        p, dtype = node.primitive, node.type.dtype
        match p:
            case Input():
                return self._source(self.inputs[p.name], node)
            case State():
                return self._source(self.states[p.name], node)
            case Weight():
                return self._source(self.weights[p.weights, p.key], node)
            case Constant():
                flat = np.frombuffer(p.data, dtype.numpy)
                return self._source(flat.reshape(self._shape(node)), node)
            case Scalar():
                return np.asarray(p.value)
            case Map():
                return _sliced(lambda *a: scalar.apply(p.fn, a, dtype, not self.wide), args)
            case Reduce():
                if len(args) == 2:
                    return _sum_of_products(args[0], args[1], p.axes)
                return reduce(p.kind, args[0], p.axes, dtype)
            case View():
                return self._view(p, args[0], self._shape(node))
            case Gather():
                return self._gather(p, args, node)
            case Position():
                shape = self._shape(node)
                return np.broadcast_to(index_values(p.expr, self._grid(p.symbols, shape)), shape)
            case Concat():
                return np.concatenate(args, axis=p.axis)
            case Scan():
                run = np.cumsum if p.kind == "sum" else np.cumprod
                with np.errstate(all="ignore"):
                    return run(args[0], axis=p.axis, dtype=args[0].dtype)
            case Carried():
                return np.stack([args[0], args[0]])
            case Scatter():
                return self._scatter(p, args, node)
            case Within():
                return self._within(p, args[0], node)
            case Update():
                return self._update(p, args)
            case Contract():
                return self._contract(p, args, self._shape(node))
            case _:
                raise TypeError(f"not a primitive with one result: {p}")

    def _source(self, array: Array, node: Node) -> Array:
        shape = self._shape(node)
        if tuple(np.shape(array)) != shape:
            raise ValueError(f"{node.primitive} has shape {np.shape(array)}, expected {shape}")
        given = wide(np.asarray(array))
        dtype = node.type.dtype
        return round_to(given, dtype) if dtype.is_float else given.astype(dtype.numpy)

    def _view(self, p: View, x: Array, shape: tuple[int, ...]) -> Array:
        if not p.guard:
            quick = _strided(x, p.symbols, p.indices, shape, self.dims)
            if quick is not None:
                return quick
        values = self._grid(p.symbols, shape)
        inside: Any = True
        for guard in p.guard:
            inside = inside & (index_values(guard, values) >= 0)
        at = [index_values(e, values) for e in p.indices]
        if not p.guard:
            return np.broadcast_to(x[tuple(np.broadcast_arrays(*at))] if at else x, shape)
        if x.size == 0:
            return np.full(shape, p.fill, x.dtype)
        kept = tuple(np.clip(i, 0, n - 1) for i, n in zip(at, x.shape, strict=True))
        return np.broadcast_to(np.where(inside, x[kept], np.asarray(p.fill, x.dtype)), shape)

    def _gather(self, p: Gather, args: Sequence[Array], node: Node) -> Array:
        shape = self._shape(node)
        values = self._grid(p.symbols, shape)
        at = []
        for index, extent in zip(p.indices, args[0].shape, strict=True):
            if isinstance(index, Indirect):
                where = tuple(index_values(e, values) for e in index.indices)
                scale, offset = (index_values(e, values) for e in (index.scale, index.offset))
                found = args[index.operand][where] * scale + offset
                at.append(self._checked(np.asarray(found), extent, shape, node))
            else:
                at.append(index_values(index, values))
        if 0 in shape:
            return np.zeros(shape, args[0].dtype)
        return np.broadcast_to(args[0][tuple(at)], shape)

    def _checked(self, found: Array, extent: int, shape: tuple[int, ...], node: Node) -> Array:
        """Negative indices from the end; raises for one out of range unless nothing reads it."""
        bad = (found < -extent) | (found >= extent)
        if 0 not in shape and bad.any():
            raise OutOfRange(node, int(found[bad].flat[0]), extent)
        return np.where(found < 0, found + extent, found)

    def _scatter(self, p: Scatter, args: Sequence[Array], node: Node) -> Array:
        base, ids, updates = args
        at = self._checked(ids, base.shape[p.axis], updates.shape, node)
        result = np.moveaxis(base.copy(), p.axis, 0)
        moved = np.moveaxis(updates, p.axis, 0)
        if moved.size:
            combine = {"add": np.add.at, "max": np.maximum.at}.get(p.kind)
            if combine is None:
                result[at] = moved
            else:
                with np.errstate(all="ignore"):  # infinities and NaN are numbers here
                    combine(result, at, moved)
        return np.moveaxis(result, 0, p.axis)

    def _within(self, p: Within, x: Array, node: Node) -> Array:
        extent, length = p.extent.evaluate(self.dims), p.length.evaluate(self.dims)
        found = np.where(x < 0, x + extent, x)
        wrong = (found < 0) | (found + length > extent)
        if wrong.any():
            raise OutOfRange(node, int(x[wrong][0]), extent)
        return found

    def _update(self, p: Update, args: Sequence[Array]) -> Array:
        result, value = np.array(args[0]), args[1]
        values = self._grid(p.symbols, value.shape)
        at = []
        for index in p.indices:
            if isinstance(index, Indirect):
                spot = tuple(index_values(e, values) for e in index.indices)
                found = args[index.operand][spot] * index_values(index.scale, values)
                at.append(found + index_values(index.offset, values))
            else:
                at.append(index_values(index, values))
        result[tuple(np.broadcast_arrays(*at, value)[:-1]) if at else ()] = value
        return result

    def _contract(self, p: Contract, args: Sequence[Array], shape: tuple[int, ...]) -> Array:
        flat, panels = args[0].reshape(-1), args[1]
        if flat.dtype.itemsize == 1:  # integers of 8 bits, whose product is in i32
            flat, panels = flat.astype(np.int32), panels.astype(np.int32)
        batch = tuple(shape[a] for a in p.batch)
        rows, columns = (int(np.prod([shape[a] for a in axes])) for axes in (p.rows, p.columns))
        depth = p.depth.evaluate(self.dims)
        values = self._grid([f"i{a}" for a in p.batch], batch)
        base = np.broadcast_to(index_values(p.base, values), batch)[..., None, None]
        step = index_values(p.row_stride, self.dims)
        at = base + np.arange(rows)[:, None] * step + np.arange(depth)
        side_by_side = (*batch, depth, panels.shape[-3] * panels.shape[-1])
        wide_panels = np.moveaxis(panels, -3, -2).reshape(side_by_side)[..., :columns]
        found: Array = np.matmul(flat[at], wide_panels)
        order = (*p.batch, *p.rows, *p.columns)
        return found.reshape([shape[a] for a in order]).transpose(np.argsort(order)).reshape(shape)


def _sliced(fn: Any, args: Sequence[Array]) -> Array:
    """A pointwise function, computed once along axes where every operand only repeats."""
    shape = np.shape(args[0])
    arrays = [np.asarray(a) for a in args]
    same = [n > 1 and all(a.strides[axis] == 0 for a in arrays) for axis, n in enumerate(shape)]
    if not any(same):
        return np.asarray(fn(*arrays))
    cut = tuple(slice(0, 1) if repeated else slice(None) for repeated in same)
    return np.broadcast_to(fn(*(a[cut] for a in arrays)), shape)


def _strided(
    x: Array,
    symbols: Sequence[str],
    indices: Sequence[Expr],
    shape: Sequence[int],
    dims: Mapping[str, int],
) -> Array | None:
    """The view without a copy, where each index is start + step * (one symbol of its own)."""
    if 0 in shape:
        return np.zeros(shape, x.dtype)
    starts, strides = [], [0] * len(shape)
    place = {name: axis for axis, name in enumerate(symbols)}
    for axis, index in enumerate(indices):
        used = [s for s in index.symbols() if s in place]
        start = index.substitute({s: 0 for s in used}).evaluate(dims)
        starts.append(start)
        for name in used:
            step = index.coefficient(name)
            if step is None or step.symbols() & place.keys():
                return None
            strides[place[name]] += step.evaluate(dims) * x.strides[axis]
    if not x.size:
        return np.zeros(shape, x.dtype)
    corner = x[tuple(slice(s, s + 1) for s in starts)]
    if 0 in corner.shape:
        raise AssertionError(f"a view starts outside its operand: {starts} of {x.shape}")
    raw = corner.view(f"u{x.itemsize}")  # NumPy reads back the names of its own dtypes only
    view = np.lib.stride_tricks.as_strided(raw, tuple(shape), strides, writeable=False)
    return view.view(x.dtype)


def _sum_of_products(u: Array, v: Array, axes: Sequence[int]) -> Array:
    """The sum of u * v along `axes`, as a matrix product where operands repeat along axes."""
    letters = [chr(97 + n) for n in range(u.ndim)]
    operands, names = [], []
    repeats = 1
    for array in (u, v):
        kept = [n for n in range(u.ndim) if array.strides[n] or array.shape[n] == 1]
        operands.append(
            array[tuple(slice(None) if n in kept else 0 for n in range(u.ndim))]
            if array.size
            else np.zeros([array.shape[n] for n in kept])
        )
        names.append("".join(letters[n] for n in kept))
    kept_names = names[0] + names[1]
    for axis in axes:
        if letters[axis] not in kept_names:
            repeats *= u.shape[axis]
    out = [n for n in range(u.ndim) if n not in axes]
    shape = tuple(u.shape[n] for n in out)
    if 0 in u.shape:
        return np.zeros(shape)
    inner = "".join(letters[n] for n in out if letters[n] in kept_names)
    with np.errstate(all="ignore"):
        found = np.einsum(f"{names[0]},{names[1]}->{inner}", *operands, optimize=True) * repeats
    full = [slice(None) if letters[n] in kept_names else None for n in out]
    return np.broadcast_to(np.asarray(found)[tuple(full)], shape)


def reduce(kind: str, x: Array, axes: tuple[int, ...], dtype: DType) -> Array:
    """The reduction along `axes`, which are removed, in the wide form of `dtype`."""
    kept = [n for n in range(x.ndim) if n not in axes]
    shape = tuple(x.shape[n] for n in kept)
    with np.errstate(all="ignore"):
        if kind in ("argmax", "argmin"):
            count = int(np.prod([x.shape[n] for n in axes]))
            flat = x.transpose([*kept, *axes]).reshape((*shape, count))
            if 0 in shape:
                return np.zeros(shape, np.int64)
            return np.asarray((np.argmax if kind == "argmax" else np.argmin)(flat, axis=-1))
        if kind in ("any", "all"):
            return np.asarray((np.any if kind == "any" else np.all)(x, axis=axes))
        if kind in ("max", "min"):
            start = lowest(dtype) if kind == "max" else highest(dtype)
            fn = np.max if kind == "max" else np.min
            return np.asarray(fn(x, axis=axes, initial=start))
        total = np.float64 if dtype.is_float else dtype.numpy
        add = np.sum if kind == "sum" else np.prod
        return np.asarray(add(x, axis=axes, dtype=total))


def sort(x: Array, axis: int, descending: bool) -> tuple[Array, Array]:
    """The values in stable order and where they came from; NaN is the greatest value."""
    keys = x.astype(np.float32) if x.dtype.kind == "V" else x  # NumPy knows no NaN of theirs
    if descending:
        order = np.argsort(np.flip(keys, axis), axis=axis, kind="stable")
        order = np.flip(x.shape[axis] - 1 - order, axis)
    else:
        order = np.argsort(keys, axis=axis, kind="stable")
    return np.take_along_axis(x, order, axis), order.astype(np.int64)
