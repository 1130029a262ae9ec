"""What an import notes of the sizes that a model was made for, where shapes do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import prod
from typing import Any

import numpy as np
import onnx

from stagefuse.dsl.dims import Expr, as_expr, const, sym
from stagefuse.dsl.frozen import frozen

from .node import Val
from .suspects import Ends, alike, at_least, equal_at, maxima, minima, quotients, solved, unfolded


@frozen
class Range:
    """What a size of the model may be: multiples of `step` from `low` to `high`."""

    low: int = 1
    high: int | None = None
    step: int = 1

    @property
    def factors(self) -> tuple[int, int | None]:
        """The least and the greatest multiple, counted in steps."""
        high = None if self.high is None else self.high // self.step
        return -(-self.low // self.step), high

    def within(self, low: int, high: int | None) -> Range:
        """Those between two ends too; itself if there are none."""
        highs = [h for h in (self.high, high) if h is not None]
        found = replace(self, low=max(self.low, low), high=min(highs, default=None))
        return self if found.high is not None and found.high < found.low else found


class Misfit:
    """A node whose shapes do not fit. `asked` are the sizes that its second operand holds, None if
    that is not known; sizes have the names of the source."""

    def __init__(self, proto: onnx.NodeProto, values: Sequence[Val]) -> None:
        self.proto, self.op = proto, proto.op_type
        self.shapes = [v.shape for v in values]
        known = values[1].known if len(values) > 1 else None
        self.asked = None if known is None else sizes_in(known)
        self.axis = next((a.i for a in proto.attribute if a.name == "axis"), -1)

    @property
    def wanted(self) -> list[Expr] | None:
        """The shape that a reshape asks for, a 0 in it as what is there; None for another node."""
        if self.op != "Reshape" or self.asked is None:
            return None
        if any(a.name == "allowzero" and a.i for a in self.proto.attribute):
            return self.asked
        shape = self.shapes[0][: len(self.asked)]
        both = zip_longest(self.asked, shape, fillvalue=const(1))
        return [have if want.as_int() == 0 else want for want, have in both]

    def taken_apart(self, wanted: Sequence[Expr]) -> dict[str, int]:
        """Sizes that a reshape divides, with the numbers by which."""
        found = unfolded(self.shapes[0], wanted)
        for size in wanted:
            found |= quotients(size)
        return found

    def varying(self) -> Sequence[Expr]:
        """The sizes that it is about: of the greatest along an axis, those of that axis alone."""
        if self.op == "TopK" and self.shapes[0]:
            return self._along(self.axis)
        return [size for shape in self.shapes for size in shape]

    def ones(self) -> Iterator[str]:
        """Sizes that are 1: those of axes that go."""
        if self.op == "Squeeze":
            axes = [v.as_int() for v in self.asked or ()]
            axes += [n for a in self.proto.attribute for n in a.ints]
            for axis in axes:
                for size in () if axis is None else self._along(axis):
                    yield from size.symbols() if size.as_symbol() else ()

    def least(self) -> tuple[Sequence[str], int] | None:
        """Sizes of an axis with the least of them at which it has the greatest that are asked."""
        along = self._along(self.axis)
        if self.op != "TopK" or not along or self.asked is None or len(self.asked) != 1:
            return None
        return at_least(along[0], self.asked[0].as_int() or 0)

    def _along(self, axis: int) -> Sequence[Expr]:
        """The size of the first operand along an axis, if it has such an axis."""
        shape = self.shapes[0]
        return [shape[axis]] if -len(shape) <= axis < len(shape) else []


@dataclass
class Guesses:
    """What sizes of the model likely are, by its names for them. `sizes` has those of the source.

    `likely` are ends, in steps of the ranges; `cut` the greatest at which a constant is cut to a
    size; `meant` what else a size is; `uneven` the numbers by which one is divided.
    """

    sizes: Mapping[str, str]
    ranges: Mapping[str, Range]
    likely: dict[str, Ends] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    meant: dict[str, Expr] = field(default_factory=dict)
    uneven: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Guesses:
        """The same, noted apart from here on."""
        return Guesses(
            self.sizes, self.ranges,
            dict(self.likely), dict(self.cut), dict(self.meant), dict(self.uneven),
        )  # fmt: skip

    def range_of(self, size: str) -> Range:
        """What one of the model's sizes may be."""
        return self.ranges.get(size, Range())

    def factors(self) -> dict[str, tuple[int, int | None]]:
        """The ends of each size of the source, which counts steps."""
        return {new: self.range_of(old).factors for old, new in self.sizes.items()}

    def note(self, proto: onnx.NodeProto, values: Sequence[Val]) -> None:
        """Note what the shapes of something that does not fit say of the sizes that were meant.

        `min(128, T)`: at most 128. `max(0, T - 4)`: at least 5. `(H + 1) // 2`: multiples of a
        power of two. A reshape of [T, 8] to [9, 8]: T is 9, of [N, T] to [B, -1]: N is B, and of
        [N, T] to [N, -1, 3]: multiples of 3. The greatest 20 of T: at least 20. [N] plus [P + T]:
        N is P + T.
        """
        if not values:
            return
        node, models = Misfit(proto, values), self._models()
        wanted = node.wanted
        divided = {} if wanted is None else node.taken_apart(wanted)
        apart = bool(divided) and len(wanted or ()) > len(node.shapes[0])  # a size becomes two
        fit: tuple[str, Ends] | None = None
        if wanted is not None and not apart and all(v.as_int() != 0 for v in wanted):
            fit = equal_at(elements(node.shapes[0]), elements(wanted))
        for size in node.varying():
            self._ends_of(size, models, None if fit is None else fit[0])
            divided |= quotients(size)
        self.uneven |= {models[name]: by for name, by in divided.items() if name in models}
        if len(values) > 1 and not apart:
            asked = wanted if wanted is not None else node.asked or []
            for first, second in alike(node.op, node.axis, node.shapes, asked):
                self._equate(first, second, models)
        if fit is not None:
            self._narrow(*fit, models)
        for name in node.ones():
            self._narrow(name, (1, 1), models)
        names, low = node.least() or ((), 1)
        for name in names:
            self._narrow(name, (low, None), models)

    def _models(self) -> dict[str, str]:
        """The model's name of each size of the source."""
        return {new: old for old, new in self.sizes.items()}

    def _ends_of(self, size: Expr, models: Mapping[str, str], settled: str | None) -> None:
        """Note the ends at which `min` and `max` in a size become something else. A shape says
        more of the `settled` one."""
        for name, most in minima(size):
            model = models.get(name)
            if model is not None and name != settled and self.range_of(model).high is None:
                self._narrow(name, (1, most), models)
                self.cut[model] = max(most, self.cut.get(model, 1))
        for name, low in maxima(size):
            self._narrow(name, (low, None), models)

    def _equate(self, a: Expr, b: Expr, models: Mapping[str, str]) -> None:
        """Note that two sizes are likely the same: `Total` is `Past + Time`."""
        for name, other in () if 1 in (a.as_int(), b.as_int()) else solved(a, b):
            used = other.symbols()
            if name not in models or not used <= set(models):
                continue
            if self.range_of(models[name]) != Range():
                continue
            if not used:
                self._narrow(name, (other.as_int() or 1,) * 2, models)
            elif all(self.range_of(models[n]).step == 1 for n in used):
                others = {n: sym(models[n]) for n in used}
                settled = {models[n] for n in used} & self.meant.keys()
                needed = any(models[name] in e.symbols() for e in self.meant.values())
                if settled or needed:
                    continue
                self.meant.setdefault(models[name], other.substitute(others))
            return

    def _narrow(self, name: str, ends: Ends, models: Mapping[str, str]) -> None:
        """Note that a size is likely between two ends, counted in its steps. It is passed over if
        it is none of the model's, but a number of results that depends on data."""
        if name not in models:
            return
        step = self.range_of(models[name]).step
        low, high = (None if end is None else end * step for end in ends)
        before = self.likely.get(models[name], (1, None))
        highs = [h for h in (high, before[1]) if h is not None]
        self.likely[models[name]] = max(low or 1, before[0]), min(highs, default=None)


def sizes_in(known: np.ndarray[Any, Any]) -> list[Expr]:
    """The sizes of a known shape; none if it is something else."""
    if known.dtype.kind not in "iO":
        return []
    return [v if isinstance(v, Expr) else as_expr(int(v)) for v in known.reshape(-1)]


def elements(shape: Sequence[Expr]) -> Expr:
    """How many elements a shape has."""
    return prod(shape, start=const(1))
