"""Runs one operation three ways: type rule, lowering interpreted, and reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stagefuse.compiler import scalar
from stagefuse.compiler.graph import Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import DType, from_numpy
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType


def tensor_type(array: np.ndarray[Any, Any], symbolic: dict[str, int] | None = None) -> TensorType:
    """The type of an array; sizes in `symbolic` are named instead."""
    dtype = from_numpy(array.dtype)
    assert dtype is not None
    names = {size: name for name, size in (symbolic or {}).items()}
    shape = tuple(sym(names[n]) if n in names else const(n) for n in array.shape)
    return TensorType(dtype, shape)


def run(
    name: str,
    tensors: dict[str, Any],
    static: dict[str, Any] | None = None,
    dims: dict[str, int] | None = None,
    wide: bool = True,
) -> list[np.ndarray[Any, Any]]:
    """The operation's lowering, interpreted; checks the inferred types against what comes out.

    `tensors` has an array, or a list of arrays, for each tensor parameter; sizes that `dims`
    names are symbolic.
    """
    op, static, dims = BUILTINS[name], dict(static or {}), dict(dims or {})
    facts = Facts({n: (0, None) for n in dims})
    args: dict[str, Any] = {p.name: p.default for p in op.params}
    args.update(static)
    b = Builder(facts)
    refs: list[Ref] = []
    inputs: dict[str, Any] = {}
    for param in op.params:
        if param.name not in tensors:
            continue
        given = tensors[param.name]
        types = []
        for array in given if isinstance(given, list) else [given]:
            type = tensor_type(array, dims)
            types.append(type)
            inputs[f"x{len(refs)}"] = array
            refs.append(b.input(f"x{len(refs)}", type))
        args[param.name] = types if isinstance(given, list) else types[0]
    results = op.infer(args, facts)
    attrs = {k: v for k, v in args.items() if k not in tensors}
    made = op.lower(b, refs, attrs, results)
    assert [b.type(ref).dtype for ref in made] == [t.dtype for t in results]
    b.graph.results = tuple(made)
    found = evaluate(b.graph, inputs, dims, wide)
    for array, ref, type in zip(found, made, results, strict=True):
        sizes = tuple(d.evaluate(dims) for d in type.shape)
        assert array.shape == sizes == tuple(d.evaluate(dims) for d in b.type(ref).shape)
        expected = np.dtype(np.float64) if type.dtype.is_float else type.dtype.numpy
        assert array.dtype == expected
    return found


def reference(
    name: str, tensors: dict[str, Any], static: dict[str, Any] | None = None
) -> list[Any]:
    """The operation's reference over the same arrays, made wide."""

    def wide(given: Any) -> Any:
        return [wide(a) for a in given] if isinstance(given, list) else scalar.wide(given)

    op = BUILTINS[name]
    given = {**{k: wide(v) for k, v in tensors.items()}, **(static or {})}
    found = op.reference(*(given[p.name] for p in op.params if p.name in given))
    return list(found) if isinstance(found, tuple | list) else [found]


def sample(
    rng: np.random.Generator, shape: Sequence[int], dtype: DType, special: bool = True
) -> np.ndarray[Any, Any]:
    """Random values of a dtype, small enough that f8 holds them, with special ones among them."""
    if dtype.is_bool:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.is_int:
        low = 0 if dtype.kind == "uint" else -9
        array = rng.integers(low, 10, shape).astype(dtype.numpy)
    else:
        array = np.asarray(rng.standard_normal(shape) * 3)
        if special and array.size > 4:
            values = [np.nan, 0.0, -0.0, np.inf, -np.inf][: 5 if dtype.bits > 8 else 3]
            array.reshape(-1)[: len(values)] = values
            array = rng.permuted(array.reshape(-1)).reshape(shape)
        array = scalar.narrow(array, dtype)
    return array


def agree(found: Any, expected: Any, rel: float = 1e-12, absolute: float = 1e-12) -> None:
    """Equal integers and bools; floats within a relative error, NaN and infinities in place."""
    expected = np.asarray(expected)
    assert np.shape(found) == expected.shape
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rel, absolute, equal_nan=True)
    else:
        np.testing.assert_array_equal(found, expected)
