"""Arguments of a call to dense arrays and sizes, or an InputError that says what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from stagefuse.compiler.plan import ArgumentPlan, PipelinePlan
from stagefuse.compiler.plan_check import session_dims, solve_order
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES, DType, from_numpy

from . import interchange
from .errors import InputError, OutOfMemory
from .prepared import Evaluator
from .signature import range_text, type_text

_C_AND_ALIGNED = 0x0001 | 0x0100  # of `ndarray.flags.num`


class Binder:
    """What one pipeline accepts."""

    def __init__(self, plan: PipelinePlan) -> None:
        self.plan = plan
        self.expected = [(i.name or "", DTYPES[i.dtype].numpy) for i in plan.inputs]
        self._order = solve_order(plan.inputs, session_dims(plan))
        self._ranges = {d.name: d for d in plan.dims}

    def arrays(self, given: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
        """One dense, aligned array an input, in order; a copy only where it must be."""
        self._names(given)
        return [self.array(argument, given[argument.name or ""]) for argument in self.plan.inputs]

    def _names(self, given: Mapping[str, Any]) -> None:
        names = [name for name, _ in self.expected]
        takes = f"{self.plan.name} takes {_listed(names)}"
        for name in given:
            if name not in names:
                near = get_close_matches(name, names, 1)
                fix = f"\n  = help: write `{near[0]}=`" if near else ""
                raise InputError(f"no input is called `{name}`: {takes}{fix}")
        missing = [name for name in names if name not in given]
        if missing:
            raise InputError(f"input {_listed(missing)} missing: {takes}")

    def array(self, argument: ArgumentPlan, value: Any) -> np.ndarray[Any, Any]:
        """A dense, aligned array of the argument's dtype and rank. Raises InputError."""
        name, dtype = argument.name or "", DTYPES[argument.dtype]
        given = value
        if type(value) is not np.ndarray:
            value = self._as_array(name, argument, value)
        wanted = dtype.numpy
        if value.dtype != wanted or not value.dtype.isnative:
            raise InputError(
                f"input `{name}` has dtype {_dtype_text(value.dtype)}, but {self.plan.name} takes "
                f"{type_text(argument.dtype, argument.shape)}\n"
                f"  = help: convert it: `{name}{interchange.conversion(given, dtype)}`"
            )
        if value.ndim != len(argument.shape):
            raise InputError(
                f"input `{name}` has {_count(value.ndim, 'dimension')}, shape {value.shape}, but "
                f"{self.plan.name} takes {type_text(argument.dtype, argument.shape)}"
                + _rank_help(name, value.ndim, len(argument.shape))
            )
        return self._dense(name, value)  # type: ignore[no-any-return]

    def _dense(self, name: str, value: Any) -> Any:
        """The value, or a copy that is dense and aligned."""
        if value.flags.num & _C_AND_ALIGNED != _C_AND_ALIGNED:
            try:
                return np.array(value, order="C", copy=True)
            except MemoryError:
                size = f"{value.nbytes / 1e6:,.1f} MB"
                raise OutOfMemory(f"no memory for a dense copy of input `{name}`: {size}") from None
        return value

    def _as_array(self, name: str, argument: ArgumentPlan, value: Any) -> Any:
        dtype = DTYPES[argument.dtype]
        if isinstance(value, np.ma.MaskedArray):
            raise InputError(
                f"input `{name}` is a masked array, whose mask would be lost\n"
                f"  = help: pass `{name}.filled(value)`"
            )
        if isinstance(value, np.ndarray):
            return np.asarray(value)
        if isinstance(value, np.generic):
            return np.asarray(value)
        if isinstance(value, (bool, int, float)):
            return self._number(name, argument, value)
        if interchange.is_foreign(value):
            return interchange.view(value, f"input `{name}`")
        raise InputError(
            f"input `{name}` is a {type(value).__name__}, but {self.plan.name} takes an array "
            f"{type_text(argument.dtype, argument.shape)}\n"
            f"  = help: make one: `np.asarray({name}, {_numpy_text(dtype)})`"
        )

    def _number(self, name: str, argument: ArgumentPlan, value: float) -> Any:
        """A Python number for a scalar input, where its kind fits as a literal's does."""
        dtype = DTYPES[argument.dtype]
        if type(value) is bool:
            fits = dtype.is_bool
        elif type(value) is int:
            fits = _in_range(value, dtype)
        else:
            fits = dtype.is_float
        if argument.shape or not fits:
            raise InputError(
                f"input `{name}` is {_number_text(value)}, but {self.plan.name} takes "
                f"{type_text(argument.dtype, argument.shape)}"
            )
        return np.array(value, dtype.numpy)

    def sizes(
        self, arrays: Sequence[np.ndarray[Any, Any]], given: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """The values of the dims, some of them given by a session.

        Raises InputError where the shapes do not fit the signature.
        """
        values = dict(given or {})
        origin = dict.fromkeys(values, "the session")
        for name, i, axis, rest, factor in self._order:
            if name in values:
                continue
            found = arrays[i].shape[axis] - rest.evaluate(values)
            place = f"dimension {axis} of `{self.plan.inputs[i].name}`"
            if found % factor or found // factor < 0:
                argument = self.plan.inputs[i]
                raise InputError(
                    f"{place} is {arrays[i].shape[axis]}, which `{argument.shape[axis]}` is for no "
                    f"size {name}"
                )
            values[name], origin[name] = found // factor, place
        self._check_shapes(arrays, values, origin)
        self.check_sizes(values, origin)
        return values

    def check_sizes(self, values: dict[str, int], origin: Mapping[str, str]) -> None:
        """Raise InputError unless sizes are within the ranges and facts of the signature.

        `origin` says of each what gave it.
        """
        self._check_ranges(values, origin)
        evaluate = Evaluator(values)
        for check in self.plan.checks:
            result = evaluate(check.expr)
            if result < 0 or (result and check.relation == "==0"):
                where = f"\n  --> {check.file}:{check.line}:{check.column}" if check.file else ""
                raise InputError(f"{check.message}; here {_values_text(values)}{where}")

    def _check_shapes(
        self,
        arrays: Sequence[np.ndarray[Any, Any]],
        values: dict[str, int],
        origin: dict[str, str],
    ) -> None:
        evaluate = Evaluator(values)
        for argument, array in zip(self.plan.inputs, arrays, strict=True):
            for axis, text in enumerate(argument.shape):
                wanted, found = evaluate(text), array.shape[axis]
                if wanted != found:
                    names = sorted(parse(text).symbols())
                    why = "".join(f"; {n} is {values[n]} by {origin[n]}" for n in names)
                    raise InputError(
                        f"dimension {axis} of `{argument.name}` is {found}, but "
                        f"{self.plan.name} takes {type_text(argument.dtype, argument.shape)}, "
                        f"so it must be {wanted}{why}\n"
                        f"  = note: `{argument.name}` has shape {array.shape}"
                    )

    def _check_ranges(self, values: dict[str, int], origin: Mapping[str, str]) -> None:
        evaluate = Evaluator(values)
        for name, value in values.items():
            dim = self._ranges.get(name)
            if dim is None:
                continue
            low = evaluate(dim.low)
            high = None if dim.high is None else evaluate(dim.high)
            if value < low or (high is not None and value > high):
                raise InputError(
                    f"{name} is {value} by {origin[name]}, but {self.plan.name} takes "
                    f"{range_text(name, low, high)}"
                )


def _in_range(value: int, dtype: DType) -> bool:
    if dtype.is_float:
        try:
            with np.errstate(over="ignore"):
                return bool(np.isfinite(np.array(float(value), dtype.numpy).astype(np.float64)))
        except OverflowError:
            return False
    return dtype.is_int and bool(np.iinfo(dtype.numpy).min <= value <= np.iinfo(dtype.numpy).max)


def _number_text(value: float) -> str:
    """A number; Python refuses to write integers of thousands of digits."""
    if type(value) is int and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return f"the number {value}"


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "no inputs"
    return ", ".join(f"`{name}`" for name in names)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _values_text(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "no sizes vary"


def _dtype_text(dtype: np.dtype[Any]) -> str:
    ours = from_numpy(dtype)
    if ours is not None:
        return f"{ours.name} ({dtype.name})"
    return dtype.name if dtype.isnative else f"{dtype.name} in foreign byte order"


def _numpy_text(dtype: DType) -> str:
    module = "ml_dtypes" if dtype.is_extended else "np"
    return f"{module}.{dtype.numpy.name}"


def _rank_help(name: str, found: int, wanted: int) -> str:
    if found + 1 == wanted:
        return f"\n  = help: one item alone is a batch of one: `{name}[None]`"
    return ""
