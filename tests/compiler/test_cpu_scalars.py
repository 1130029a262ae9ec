"""Every scalar function, on every dtype it takes, against its NumPy meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stagefuse.compiler import scalar
from stagefuse.compiler.kernel_ir import Buffer, Index, Kernel, Load, Op, Store
from stagefuse.dsl.dims import sym
from stagefuse.dsl.dtypes import DTYPES, DType

from .cpu_run import LEVELS, Compiled

N = sym("N")
I = (Index(sym("i")),)  # noqa: E741
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.5, 3.0, 1e-30, -1e-42, 1e30, 88.5, -104.0, 709.5,
           -745.0, 1e300, 5e-324, 448.0, 465.0, 57344.0, 65504.0, 2.0**-9, 2.0**-10, 1e5,
           float("inf"), float("-inf"), float("nan")]  # fmt: skip


def pointwise(name: str, fn: str, sources: list[DType], result: DType) -> Kernel:
    """out[i] = fn(x0[i], x1[i], ...)"""
    loads = tuple(Load(f"x{k}", I, dtype) for k, dtype in enumerate(sources))
    buffers = tuple(Buffer(f"x{k}", dtype, (N,), "in") for k, dtype in enumerate(sources))
    op = Op(fn, loads, result.compute, result if fn == "round_to" else None)
    return Kernel(
        name, (*buffers, Buffer("out", result, (N,), "out")), ("N",), (("i", N),),
        (Store("out", I, op),),
    )  # fmt: skip


def cases() -> list[tuple[str, str, list[DType], DType]]:
    found = []
    for fn in scalar.FUNCTIONS.values():
        for dtype in DTYPES.values():
            if fn.name == "cast":
                for target in DTYPES.values():
                    if not target.is_small_float:
                        found.append((f"cast.{dtype}.{target}", "cast", [dtype], target))
                continue
            if not fn.takes(dtype):
                continue
            sources = [dtype] * fn.arity
            if fn.name == "select":
                sources[0] = DTYPES["bool"]
            result = DTYPES["bool"] if fn.result == "bool" else dtype
            found.append((f"{fn.name}.{dtype}", fn.name, sources, result))
    for dtype in DTYPES.values():
        if dtype.is_small_float:
            found.append((f"round_to.{dtype}", "round_to", [DTYPES["f32"]], dtype))
    return found


CASES = cases()
MANTISSA = {"f64": 52, "f32": 23, "f16": 10, "bf16": 7, "f8e4m3": 3, "f8e5m2": 2}
LOWEST = {"f64": -1022, "f32": -126, "f16": -14, "bf16": -126, "f8e4m3": -6, "f8e5m2": -14}


@pytest.fixture(scope="module", params=LEVELS)
def compiled(request: Any) -> Any:
    return Compiled([pointwise(*case) for case in CASES], request.param)


def samples(dtype: DType, seed: int) -> np.ndarray[Any, Any]:
    """Values of a dtype: special ones first, in an order that depends on the seed."""
    rng = np.random.default_rng(seed)
    if dtype.is_bool:
        return rng.integers(0, 2, 1001).astype(bool)
    if dtype.is_int:
        info = np.iinfo(dtype.numpy)
        wide = rng.integers(info.min, info.max, 500, dtype.numpy, endpoint=True)
        small = rng.integers(max(-9, info.min), 9, 480).astype(dtype.numpy)
        ends = np.array([info.min, info.max, 0, 1, info.min + 1] * 4, dtype.numpy)
        return rng.permutation(np.concatenate([wide, small, ends, ends[:1]]))
    if dtype.bits <= 16:
        bits = rng.integers(0, 1 << dtype.bits, 1001).astype(f"u{dtype.itemsize}")
        return bits.view(dtype.numpy)
    spread = rng.standard_normal(500) * 10.0 ** rng.integers(-5, 5, 500)
    with np.errstate(all="ignore"):
        values = np.concatenate([spread, rng.standard_normal(447), SPECIAL, SPECIAL])
        return rng.permutation(values).astype(dtype.numpy)


def distance_unit(value: Any, dtype: DType) -> Any:
    """The unit in the last place of values of a dtype."""
    exponent = np.floor(np.log2(np.maximum(np.abs(value), 5e-324)))
    exponent = np.maximum(exponent, LOWEST[dtype.name])
    step = np.ldexp(1.0, (exponent - MANTISSA[dtype.name]).astype(int))
    return np.maximum(step, 5e-324)


def distance(got: Any, want: Any, dtype: DType) -> Any:
    """Difference in units in the last place of the wanted value, in a dtype."""
    with np.errstate(all="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        gap = np.abs(got - want) / distance_unit(want, dtype)
    return np.where(same, 0.0, np.where(np.isnan(gap), np.inf, gap))


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_matches_numpy(compiled: Compiled, case: tuple[str, str, list[DType], DType]) -> None:
    name, fn, sources, result = case
    inputs = [samples(dtype, k + 1) for k, dtype in enumerate(sources)]
    if fn == "pow" and result.is_float:
        whole = np.random.default_rng(9).integers(-5, 6, 501)
        inputs[1][::2] = whole.astype(result.numpy)
    out = np.zeros(1001, result.numpy)
    assert compiled(name, [*inputs, out], {"N": 1001}) == [0, 0, 0, 0]
    with np.errstate(all="ignore"):
        wide = [scalar.wide(x) for x in inputs]
    if fn == "round_to":
        want = scalar.wide(np.asarray(scalar.convert(wide[0], result)))
    else:
        want = scalar.apply(fn, wide, result)
    with np.errstate(all="ignore"):
        got = scalar.wide(out)
    if not result.is_float:
        bad = np.flatnonzero(got != want)
        assert not len(bad), [(*(x[i] for x in inputs), got[i], want[i]) for i in bad[:5]]
        return
    limit = max(scalar.FUNCTIONS[fn].ulp, 0.5) if fn != "round_to" else 0
    if result.is_small_float and limit:
        limit = 1.0  # two roundings
    gap = distance(got, want, result)
    if fn != "round_to" and scalar.FUNCTIONS[fn].by_argument:
        near = np.isfinite(want) & np.isfinite(got)
        unit = distance_unit(np.where(near, wide[0], 1.0), result)
        apart = np.abs(np.where(near, got, 0.0) - np.where(near, want, 0.0))
        gap = np.where(near, apart / unit, gap)
    bad = np.flatnonzero(gap > limit)
    assert not len(bad), [(*(x[i] for x in inputs), got[i], want[i], gap[i]) for i in bad[:5]]


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", [d.name for d in DTYPES.values() if d.is_int])
def test_floats_around_the_ends_of_integers(compiled: Compiled, source: str, target: str) -> None:
    """Towards 0, and to the nearest that there is."""
    kind, ends = DTYPES[source].numpy, np.iinfo(DTYPES[target].numpy)
    numbers = [
        kind.type(n + part) for n in (ends.min, ends.max, 0) for part in (-1, -0.5, 0, 0.5, 1)
    ]
    near = [np.nextafter(n, kind.type(to)) for n in numbers for to in (-np.inf, np.inf)]
    x = np.array([*numbers, *near, np.nan, np.inf, -np.inf, 1e30, -1e30], kind)
    wanted = [
        0 if np.isnan(v) else int(min(max(v, float(ends.min)), float(ends.max))) for v in x.tolist()
    ]
    out = np.zeros(len(x), DTYPES[target].numpy)
    compiled(f"cast.{source}.{target}", [x, out], {"N": len(x)})
    assert out.tolist() == [min(max(n, ends.min), ends.max) for n in wanted]


def test_quotients_of_long_integers_of_every_size(
    compiled: Compiled, rng: np.random.Generator
) -> None:
    """They are divided as f64, which rounds integers and quotients, and then put right."""
    ends, n = np.iinfo(np.int64), 20000
    near = [2**p + d for p in (0, 1, 31, 52, 53, 62) for d in (-1, 0, 1)]
    edges = [*near, *(-x for x in near), ends.min, ends.min + 1, ends.max - 512, ends.max]
    x, b = (rng.integers(ends.min, ends.max, n) >> rng.integers(0, 64, n) for _ in range(2))
    close = (b >> 20) * rng.integers(-(2**20), 2**20, n) + rng.integers(-1, 2, n)
    pairs = [*zip(x.tolist(), b.tolist(), strict=True)]
    pairs += zip(close.tolist(), (b >> 20).tolist(), strict=True)
    pairs += [(v, w) for v in edges for w in edges]
    left, right = (np.array(v, np.int64) for v in zip(*pairs, strict=True))
    for fn, of in (("floordiv", int.__floordiv__), ("mod", int.__mod__)):
        want = [0 if w == 0 else (of(v, w) + 2**63) % 2**64 - 2**63 for v, w in pairs]
        found = np.empty(len(pairs), np.int64)
        compiled(f"{fn}.i64", [left, right, found], {"N": len(pairs)})
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("name", [d.name for d in DTYPES.values() if d.is_int and d.bits <= 32])
def test_quotients_of_integers_next_to_whole_ones(
    compiled: Compiled, name: str, rng: np.random.Generator
) -> None:
    """They are divided as floats, which round."""
    dtype, info = DTYPES[name].numpy, np.iinfo(DTYPES[name].numpy)
    size = 2.0 ** rng.uniform(0, info.bits - 1, 20000)
    b = np.where(rng.random(20000) < 0.5, size, -size).astype(np.int64)
    b = np.clip(b, info.min, info.max)
    b[b == 0] = 1
    whole = np.trunc(rng.uniform(info.min, info.max, 20000) / b).astype(np.int64)
    a = np.clip(whole * b + rng.integers(-1, 2, 20000), info.min, info.max)
    for fn, want in (("floordiv", a // b), ("mod", a % b)):
        found = np.empty(20000, dtype)
        compiled(f"{fn}.{name}", [a.astype(dtype), b.astype(dtype), found], {"N": 20000})
        np.testing.assert_array_equal(found, want.astype(dtype))
