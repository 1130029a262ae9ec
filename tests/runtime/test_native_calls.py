"""Calls that run no Python: the same results and errors as in Python, at any time."""

from __future__ import annotations

import gc
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.runtime import native_calls
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from . import handmade
from .test_forks import in_a_child

Array = np.ndarray[Any, Any]
BOTH = """pipeline both(x: f32[M, N], y: f32[M, N], s: f32) -> (sum: f32[M, N], scaled: f32[N, M]):
    x + y, transpose(x) * s
"""
PICK = """pipeline pick(x: i32[N], at: i64[K]) -> i32[K]:
    x[at]
"""


def is_native(pipe: Any) -> bool:
    """Whether its calls begin in native code."""
    return inspect.ismethoddescriptor(type(pipe).__call__)


def python_calls(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call that Python does from now on."""
    counted: list[int] = []

    def in_python(self: Any, *args: Any, **inputs: Any) -> Any:
        counted.append(1)
        return CpuPipeline.__call__(self, *args, **inputs)

    monkeypatch.setattr(type(pipe), "_in_python", in_python)
    return counted


def of_both(rng: np.random.Generator, m: int, n: int) -> dict[str, Array]:
    x, y = rng.standard_normal((2, m, n), np.float32)
    return {"x": x, "y": y, "s": np.array(rng.standard_normal(), np.float32)}


def check(pipe: Any, given: dict[str, Array], large: bool = False) -> None:
    found = pipe(**given)
    np.testing.assert_array_equal(found.sum, given["x"] + given["y"])
    np.testing.assert_array_equal(found.scaled, given["x"].T * given["s"])
    assert type(found.sum) is np.ndarray and found.sum.flags.writeable
    assert found.sum.flags.owndata or large


@pytest.fixture()
def both() -> Iterator[Any]:
    with sf.compile(BOTH) as pipe:
        yield pipe


@pytest.fixture()
def pick(rng: np.random.Generator) -> Iterator[Any]:
    """Native already for 5 elements and 3 positions."""
    with sf.compile(PICK) as pipe:
        for _ in range(2):
            pipe(x=np.arange(5, dtype=np.int32), at=np.zeros(3, np.int64))
        assert is_native(pipe)
        yield pipe


def test_from_the_third_call_of_any_shape_on(
    both: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(0, 0), (0, 3), (1, 1), (3, 0), (7, 1), (13, 17), (64, 5)]
    for _ in range(2):
        assert not is_native(both) or _ == 1
        for m, n in shapes:
            check(both, of_both(rng, m, n))
    counted = python_calls(both, monkeypatch)
    for m, n in 2 * shapes:
        given = of_both(rng, m, n)
        check(both, given)
        check(both, dict(reversed(given.items())))
    assert counted == []
    check(both, of_both(rng, 5, 64))
    assert counted == [1]


def test_whatever_does_not_suit_goes_to_python(
    both: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = of_both(rng, 4, 6)
    for _ in range(2):
        check(both, given)
    counted = python_calls(both, monkeypatch)
    unaligned = np.frombuffer(b"." + given["x"].tobytes(), np.float32, offset=1).reshape(4, 6)
    odd = [
        given | {"x": np.asfortranarray(given["x"])}, given | {"x": unaligned},
        given | {"x": given["x"].view(np.recarray)}, given | {"s": 0.5},
        {"".join(["", name]): value for name, value in given.items()},
    ]  # fmt: skip
    for inputs in odd:
        found = both(**inputs)
        np.testing.assert_array_equal(found.sum, given["x"] + given["y"])
    out = np.empty((4, 6), np.float32), np.empty((6, 4), np.float32)
    assert both(**given, out=out)[0] is out[0]
    np.testing.assert_array_equal(out[1], given["x"].T * given["s"])
    wrong: list[tuple[dict[str, Any], str]] = [
        (given | {"x": given["x"].astype(np.float64)}, "input `x` has dtype f64"),
        (given | {"x": given["x"][None]}, "input `x` has 3 dimensions"),
        (given | {"z": given["x"]}, "no input is called `z`"),
        ({"x": given["x"], "y": given["y"]}, "input `s` missing"),
        ({"x": given["x"], "y": given["y"], "t": given["s"]}, "no input is called `t`"),
        (given | {"x": None}, "input `x` is a NoneType"),
        (given | {"y": given["y"][:, :5]}, "dimension 1 of `y` is 5"),
        ({}, "missing"),
    ]
    for inputs, message in wrong:
        with pytest.raises(sf.InputError, match=message):
            both(**inputs)
    with pytest.raises(sf.InputError, match="inputs are given by name"):
        both(given["x"], given["y"], given["s"])
    assert len(counted) >= 4 + 1 + len(wrong) + 1
    check(both, given)


def test_an_index_out_of_range_is_raised_and_forgotten(pick: Any) -> None:
    x = np.arange(5, dtype=np.int32)
    for bad in (7, 1 << 40):
        with pytest.raises(sf.IndexOutOfRange, match=f"it is {bad}"):
            pick(x=x, at=np.array([0, bad, 1]))
        for _ in range(3):
            np.testing.assert_array_equal(pick(x=x, at=np.array([4, 0, 2])), x[[4, 0, 2]])
        assert is_native(pick)


def test_more_shapes_than_are_looked_through(both: Any, rng: np.random.Generator) -> None:
    for _ in range(3):
        for n in range(native_calls.MAX_BUCKETS + 5):
            check(both, of_both(rng, 2, n))


def test_nothing_is_kept_of_arguments_and_results(both: Any, rng: np.random.Generator) -> None:
    given = of_both(rng, 3, 5)
    for _ in range(3):
        check(both, given)
    watched = [*given.values(), given["x"].dtype, type(both), *(sys.intern(n) for n in given)]
    gc.collect()  # what other tests left may refer to the same dtype
    before = [sys.getrefcount(value) for value in watched]
    for _ in range(100):
        found = both(**given)
        seen = [weakref.ref(result) for result in found]
        del found
        assert all(result() is None for result in seen)
    assert [sys.getrefcount(value) for value in watched] == before


def test_one_result_is_an_array_and_no_class(rng: np.random.Generator) -> None:
    with sf.compile("pipeline p(x: f64[N]) -> f64:\n    sum(x)\n") as pipe:
        x = rng.integers(-9, 9, 11).astype(np.float64)
        for _ in range(4):
            found = pipe(x=x)
            assert type(found) is np.ndarray and found.shape == () and found == x.sum()
        assert is_native(pipe)


def test_large_results_take_memory_that_nothing_uses(rng: np.random.Generator) -> None:
    with sf.compile(BOTH, threads=1) as pipe:
        given = of_both(rng, 211, 307)  # of which each result has 259 KB
        kept = [pipe(**given) for _ in range(4)]
        assert is_native(pipe)
        places = {result.ctypes.data for found in kept for result in found}
        assert len(places) == 8
        for found in kept:
            np.testing.assert_array_equal(found.sum, given["x"] + given["y"])
        del kept, found
        again = pipe(**given)
        assert {result.ctypes.data for result in again} <= places


def test_memory_that_is_not_there_is_said(
    both: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise sf.OutOfMemory("no memory for a result")

    given = of_both(rng, 211, 307)
    for _ in range(2):
        check(both, given, large=True)
    calls = both._calls
    monkeypatch.setattr(type(both._pool), "_another", none)
    kept = [both(**given)]
    with pytest.raises(sf.OutOfMemory, match="no memory for a result"):
        for _ in range(9):
            kept.append(both(**given))
    assert both._calls is calls and not calls.busy
    kept.clear()
    check(both, given, large=True)


def test_threads_share_a_table(pick: Any, rng: np.random.Generator) -> None:
    x = rng.integers(-99, 99, 5).astype(np.int32)

    def calls(seed: int) -> None:
        own = np.random.default_rng(seed)
        for _ in range(300):
            at = own.integers(0, 5, own.integers(3, 5))
            np.testing.assert_array_equal(pick(x=x, at=at), x[at])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(calls, int(s)) for s in rng.integers(0, 1 << 30, 6)]:
                done.result()
    finally:
        sys.setswitchinterval(before)


def test_closing_while_calls_run(rng: np.random.Generator) -> None:
    x = rng.standard_normal((16, 1000), np.float32)
    for _ in range(2):
        pipe: Any = sf.compile("pipeline p(x: f32[M, N]) -> f32[M]:\n    sum(sin(x) * cos(x), 1)\n")
        expected = [pipe(x=x) for _ in range(3)][0]
        assert is_native(pipe)
        with ThreadPoolExecutor(3) as pool:
            begun = threading.Barrier(4)
            done = [pool.submit(calls_until_closed, pipe, x, expected, begun) for _ in range(3)]
            begun.wait()
            pipe.close()
            assert [d.result() for d in done] == 3 * ["the pipeline p is closed"]
        assert not is_native(pipe) and pipe._calls is None
        del pipe
        gc.collect()


def calls_until_closed(pipe: Any, x: Array, expected: Array, begun: threading.Barrier) -> str:
    begun.wait()
    try:
        while True:
            np.testing.assert_array_equal(pipe(x=x), expected)
    except sf.InputError as error:
        return str(error)


def test_a_child_process_calls_too(pick: Any) -> None:
    x, at = np.arange(5, dtype=np.int32), np.array([1, 1, 3])
    child = os.fork()
    if child == 0:
        os._exit(0 if (pick(x=x, at=at) == x[at]).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_made_during_a_native_call_has_native_calls(
    both: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = of_both(rng, 211, 307)  # whose results are the pool's, which Python asks for memory
    kept = [both(**given) for _ in range(6)]
    assert is_native(both)
    main, within, forked = threading.get_ident(), threading.Event(), threading.Event()
    another = type(both._pool)._another

    def slowly(*args: Any) -> Any:
        if threading.get_ident() != main:
            within.set()
            forked.wait(9)
        return another(*args)

    def works() -> bool:
        for _ in range(2):
            check(both, given, large=True)
        counted = python_calls(both, monkeypatch)
        check(both, given, large=True)
        return is_native(both) and not counted

    monkeypatch.setattr(type(both._pool), "_another", slowly)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(check, both, given, large=True)
        try:
            assert within.wait(9) and both._calls.busy
            assert in_a_child(works) == 0
            assert both._calls.busy  # here
        finally:
            forked.set()
        call.result()
    assert not both._calls.busy and len(kept) == 6


def test_signature_and_name(pick: Any) -> None:
    assert str(inspect.signature(pick)) == "(*args, out=None, **inputs)"
    assert type(pick).__name__ == "CpuPipeline" and isinstance(pick, CpuPipeline)
    assert type(pick).__call__.__doc__ == CpuPipeline.__call__.__doc__


@pytest.mark.parametrize("case", ["no code", "damaged", "not ELF's", "other objects"])
def test_without_native_calls_python_does_them(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = handmade.plan()
    if case == "other objects":
        monkeypatch.setattr(native_calls, "_made", {})
        monkeypatch.setitem(native_calls.ARRAY, "type", 0)
    else:
        code = {"no code": b"", "damaged": plan.call[:999], "not ELF's": b"\x7fELF" + bytes(99)}
        plan = replace(plan, call=code[case])
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    with CpuPipeline(plan, "affine") as pipe:
        for _ in range(4):
            np.testing.assert_array_equal(pipe(x=x).y, handmade.expected(x)[0])
        assert not is_native(pipe)
