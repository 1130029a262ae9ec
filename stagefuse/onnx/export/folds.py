"""Reductions, running sums, sorting and scattering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stagefuse.compiler import scalar
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import F16, F32, I32, I64, U8, DType

from .layout import Layout
from .model import Model, Tensor, carrier
from .sizes import Sizes

REDUCTIONS = {"sum": "ReduceSum", "prod": "ReduceProd", "max": "ReduceMax", "min": "ReduceMin",
              "any": "ReduceMax", "all": "ReduceMin", "mean": "ReduceMean"}  # fmt: skip

_RUNNING = {"sum": "CumSum", "prod": "CumProd"}


class Folds:
    """Writes what combines elements along axes."""

    def __init__(self, model: Model, sizes: Sizes, layout: Layout) -> None:
        self.model, self.sizes, self.layout = model, sizes, layout

    def reduce(
        self,
        kind: str,
        x: Tensor,
        shape: Sequence[Expr],
        axes: Sequence[int],
        result: DType,
        keep: bool = False,
    ) -> Tensor:
        """A reduction of a tensor of logical `shape`; floats accumulate in f32 or wider."""
        if kind in ("sum", "prod"):
            x = self.model.cast(x, carrier(result))
        lead = len(shape) - x.rank
        if any(axis < lead or x.shape[axis - lead] != shape[axis] for axis in axes):
            x = self.layout.whole(x, shape)
            lead = 0
        if kind.startswith("arg"):
            return self._position(kind, x, shape, axes, lead)
        own = [axis - lead for axis in axes]
        dtype = x.dtype
        wide = self._accumulator(kind, dtype)
        source = self.model.cast(x, wide)
        for_empty = kind in ("max", "min", "any", "all")
        if for_empty and not all(self.sizes.facts.is_positive(x.shape[a]) for a in own):
            source = self._with_identity(kind, source, own)
        kept = [const(1) if n in own else d for n, d in enumerate(x.shape)]
        found = kept if keep else [d for n, d in enumerate(x.shape) if n not in own]
        made = self._reduction(REDUCTIONS[kind], source, own, found, keep)
        return self.model.cast(made, dtype)

    def _reduction(
        self, op: str, x: Tensor, axes: list[int], shape: Sequence[Expr], keep: bool
    ) -> Tensor:
        if op == "ReduceSum" or self.model.opset >= 18:
            given = self.model.constant(axes)
            return self.model.node(op, [x, given], x.dtype, shape, keepdims=int(keep))
        return self.model.node(op, [x], x.dtype, shape, axes=axes, keepdims=int(keep))

    def _accumulator(self, kind: str, dtype: DType) -> DType:
        if dtype == F16 and kind in ("sum", "prod", "mean"):
            return F32
        if dtype.is_bool:
            return U8
        wider = {"i16": I32, "u16": I32, "u32": I64}
        return wider.get(dtype.name, dtype)

    def _with_identity(self, kind: str, x: Tensor, axes: list[int]) -> Tensor:
        """One more element, for axes that may be empty: engines refuse to reduce nothing."""
        start = scalar.identity(kind, x.dtype)
        value = self.model.constant(np.array(start), x.dtype)
        widths = [0] * x.rank + [int(n == axes[0]) for n in range(x.rank)]
        shape = [d + 1 if n == axes[0] else d for n, d in enumerate(x.shape)]
        given = [x, self.model.constant(widths), value]
        found = self.model.node("Pad", given, x.dtype, shape)
        rest = [a for a in axes[1:] if not self.sizes.facts.is_positive(x.shape[a])]
        return self._with_identity(kind, found, rest) if rest else found

    def _position(
        self, kind: str, x: Tensor, shape: Sequence[Expr], axes: Sequence[int], lead: int
    ) -> Tensor:
        """The first extreme element; several axes are one first."""
        op = "ArgMax" if kind == "argmax" else "ArgMin"
        x = self.model.cast(x, self._accumulator("max", x.dtype))
        own = [axis - lead for axis in axes]
        rest = [n for n in range(x.rank) if n not in own]
        kept = [x.shape[n] for n in rest]
        axis = own[0]
        if len(own) > 1:
            count = const(1)
            for a in own:
                count = count * x.shape[a]
            x = self.layout.reshaped(self.layout.transposed(x, [*rest, *own]), [*kept, count])
            axis = len(rest)
        return self.model.node(op, [x], I64, kept, axis=axis, keepdims=0)

    def scan(self, kind: str, x: Tensor, shape: Sequence[Expr], axis: int) -> Tensor:
        if kind == "prod":
            self.model.need(26, "`cumprod`")
        x = self.layout.whole(x, shape)
        wide = F32 if x.dtype == F16 else x.dtype
        given = [self.model.cast(x, wide), self.model.constant(axis)]
        return self.model.cast(self.model.node(_RUNNING[kind], given, wide, shape), x.dtype)

    def sort(
        self, x: Tensor, shape: Sequence[Expr], axis: int, descending: bool, count: Expr
    ) -> tuple[Tensor, Tensor]:
        """The first `count` elements in order, and their positions."""
        x, dtype = self.layout.whole(x, shape), x.dtype
        if dtype.is_int or dtype.is_bool:
            x = self.model.cast(x, self._accumulator("max", dtype))
        given = [x, self.sizes.vector([count])]
        kept = tuple(count if n == axis else d for n, d in enumerate(shape))
        results = [(x.dtype, kept), (I64, kept)]
        values, order = self.model.many(
            "TopK", given, results, axis=axis, largest=int(descending), sorted=1
        )
        return self.model.cast(values, dtype), order

    def scatter(
        self,
        kind: str,
        tensors: Sequence[Tensor],
        base: Sequence[Expr],
        updates: Sequence[Expr],
        axis: int,
    ) -> Tensor:
        """ScatterElements: the positions are repeated to the shape of the updates."""
        if kind == "max":
            self.model.need(18, "`scatter_max`")
        into, ids, by = tensors
        dtype = into.dtype
        wide = U8 if dtype.is_bool and kind == "max" else dtype
        into, by = (self.model.cast(self.layout.whole(x, s), wide)
                    for x, s in ((into, base), (by, updates)))  # fmt: skip
        ids = self.layout.whole(ids, [updates[axis]])
        ids = self.layout.unsqueezed(ids, list(range(1, len(base) - axis)))
        ids = self.layout.whole(ids, updates)
        how = {"add": "add", "max": "max", "set": "none"}[kind]
        found = self.model.node("ScatterElements", [into, ids, by], wide, base,
                                axis=axis, reduction=how)  # fmt: skip
        return self.model.cast(found, dtype)
