"""Axes put in place: from a tensor whose axes have labels to one that broadcasts to a shape."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl.dims import Expr, const

from .model import Model, Tensor
from .sizes import Sizes, broadcast

Labels = list[int | None]
"""For each axis of a tensor, the axis of the result that it becomes; None for one of size 1."""


class Layout:
    """Transpose, Squeeze, Unsqueeze, Expand and Reshape, where they are needed."""

    def __init__(self, model: Model, sizes: Sizes) -> None:
        self.model, self.sizes = model, sizes

    def placed(self, x: Tensor, labels: Labels, rank: int) -> Tensor:
        """A tensor that broadcasts to the result: its axes in order, axes of size 1 between."""
        used = [label for label in labels if label is not None]
        wanted: Labels = [n if n in used else None for n in range(min(used, default=rank), rank)]
        if labels == wanted:
            return x
        if sorted(used) != used:
            spare = [n for n, label in enumerate(labels) if label is None]
            if len(spare) != wanted.count(None):
                x, labels = self._squeezed(x, spare), [n for n in labels if n is not None]
                order = [labels.index(n) for n in sorted(used)]
            else:
                order = [spare.pop(0) if n is None else labels.index(n) for n in wanted]
            x, labels = self.transposed(x, order), [labels[n] for n in order]
            if labels == wanted:
                return x
        spare = [n for n, label in enumerate(labels) if label is None]
        x = self._squeezed(x, spare)
        return self.unsqueezed(x, [n for n, label in enumerate(wanted) if label is None])

    def transposed(self, x: Tensor, order: Sequence[int]) -> Tensor:
        if list(order) == list(range(x.rank)):
            return x
        shape = [x.shape[n] for n in order]
        return self.model.node("Transpose", [x], x.dtype, shape, perm=list(order))

    def _squeezed(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        if not axes:
            return x
        shape = [d for n, d in enumerate(x.shape) if n not in axes]
        return self.model.node("Squeeze", [x, self.model.constant(list(axes))], x.dtype, shape)

    def unsqueezed(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """With axes of size 1 at these places of the result."""
        if not axes:
            return x
        shape = list(x.shape)
        for axis in sorted(axes):
            shape.insert(axis, const(1))
        if x.known is not None:
            return self.model.constant(x.known.reshape([d.as_int() or 0 for d in shape]), x.dtype)
        return self.model.node("Unsqueeze", [x, self.model.constant(list(axes))], x.dtype, shape)

    def whole(self, x: Tensor, shape: Sequence[Expr]) -> Tensor:
        """Repeated along the axes of which only one element is stored."""
        if x.shape == tuple(shape):
            return x
        if broadcast(x.shape, (const(1),) * len(shape)) == tuple(shape):
            return self.unsqueezed(x, list(range(len(shape) - x.rank)))
        return self.model.node("Expand", [x, self.sizes.vector(shape)], x.dtype, shape)

    def reshaped(self, x: Tensor, shape: Sequence[Expr]) -> Tensor:
        """The same elements in order under another shape; sizes that vary are left to -1 or 0."""
        x = self.model.reshaped.get(x.name, x)
        if x.shape == tuple(shape):
            return x
        facts, given = self.sizes.facts, [d.as_int() for d in shape]
        copied = [
            0 if d is None and n < x.rank and x.shape[n] == shape[n] else d
            for n, d in enumerate(given)
        ]
        missing = [n for n, d in enumerate(copied) if d is None]
        others = all(facts.is_positive(d) for n, d in enumerate(shape) if n not in missing)
        if (len(missing) <= 1 and others or not missing) and 0 not in given:
            target = self.model.constant([-1 if d is None else d for d in copied])
        else:
            target = self.sizes.vector(shape)
        zero = {"allowzero": 1} if target.known is None or 0 in given else {}
        found = self.model.node("Reshape", [x, target], x.dtype, shape, **zero)
        self.model.reshaped[found.name] = x
        return found
