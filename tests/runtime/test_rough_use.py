"""Calls that go wrong half-way: what came before is whole, and nothing is read out of bounds."""

import copy
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.runtime.emulator_driver import EmulatorDriver


def compiled(tmp_path: Path, source: str) -> Any:
    path = tmp_path / "p.pipe"
    path.write_text(source)
    return sf.compile(path)


def test_results_before_a_failing_batch_are_given(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "pipeline p(x: f32[N]):\n    x + 1.0\n")
    x = np.zeros(3, np.float32)

    def batches() -> Iterator[dict[str, Any]]:
        yield {"x": x}
        yield {"x": x}
        raise RuntimeError("no more")

    found = []
    with pytest.raises(RuntimeError, match="no more"):
        for y in pipe.map(batches(), depth=3):
            found.append(y)
    assert len(found) == 2


def test_numbers_in_lists_are_rounded_once_to_the_dtype_that_is_written(tmp_path: Path) -> None:
    pipe = compiled(
        tmp_path,
        "pipeline p(x: f64) -> (f64[2, 2], f32[3]):\n"
        "    f64([[0.1, x], [-x, 2]]), concat([[0.1], f32([7, 0.3])])\n",
    )
    matrix, row = pipe(x=np.float64(1 / 3))
    assert matrix.tolist() == [[0.1, 1 / 3], [-1 / 3, 2.0]]
    assert row.tolist() == np.float32([0.1, 7, 0.3]).tolist()


def test_an_index_into_an_empty_dimension_is_refused(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "pipeline p(x: f32[V, D], ids: i64[T]):\n    x[ids]\n")
    empty = np.zeros((0, 2), np.float32)
    with pytest.raises(sf.InputError, match="no index is in range"):
        pipe(x=empty, ids=np.zeros(1, np.int64))
    assert pipe(x=empty, ids=np.zeros(0, np.int64)).shape == (0, 2)


def test_argmax_of_an_empty_axis_is_refused_at_the_call(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "pipeline p(x: f32[B, N]):\n    argmax(x, axis=1)\n")
    with pytest.raises(sf.InputError, match="no answer"):
        pipe(x=np.zeros((2, 0), np.float32))
    assert pipe(x=np.zeros((0, 2), np.float32)).shape == (0,)


def test_a_negative_size_is_refused_at_the_call(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "pipeline p(x: f32[N]):\n    x, zeros([N - 2]), iota(N - 2)\n")
    with pytest.raises(sf.InputError, match="must not be negative"):
        pipe(x=np.zeros(1, np.float32))
    assert pipe(x=np.zeros(3, np.float32))[1].shape == (1,)


def test_what_does_not_fit_memory_is_out_of_memory(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "pipeline p(x: f32[N]):\n    x + 1.0\n")
    with pytest.raises(sf.OutOfMemory, match="dense copy of input `x`"):
        pipe(x=np.broadcast_to(np.float32(1), (1 << 45,)))
    pipe = compiled(tmp_path, "pipeline p(x: u8[N]):\n    zeros([N, 1 << 32, 1 << 32])\n")
    with pytest.raises(sf.OutOfMemory, match="larger than memory can be for N = 0"):
        pipe(x=np.zeros(0, np.uint8))
    pipe = compiled(tmp_path, "pipeline p(x: u8[N]):\n    x, zeros([N * (1 << 60)])\n")
    with pytest.raises(sf.OutOfMemory, match="larger than memory can be for N = 9"):
        pipe(x=np.zeros(9, np.uint8))


def test_a_compiled_file_is_no_source(tmp_path: Path) -> None:
    path = tmp_path / "p.fused"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(sf.PlanError, match=r"is compiled already\n.*stagefuse\.load"):
        sf.compile(path)


def test_a_pipeline_is_not_pickled_or_copied(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "pipeline p(x: f32[N]):\n    x + 1.0\n")
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="load its file where it is needed"):
            copied(pipe)


SCALED = 'weights w = "w.npz"\npipeline p(x: f32[4]):\n    x * w.a\n'


def test_weights_of_foreign_byte_order_are_read(tmp_path: Path) -> None:
    a = np.arange(4, dtype=">f4")
    pipe = sf.compile(SCALED, weights={"w": {"a": a, "other": np.zeros(2, complex)}})
    assert pipe(x=np.ones(4, np.float32)).tolist() == [0, 1, 2, 3]


def test_weights_may_change_once_they_are_compiled() -> None:
    a, x = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    with sf.compile(SCALED, weights={"w": {"a": a[::1]}}) as pipe:
        a[:] = -1
        assert pipe(x=x).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"w": 3}, TypeError, "neither a path nor a mapping"),
        (["w.npz"], TypeError, "a mapping by name"),
        ({"w": {3: np.zeros(4, np.float32)}}, sf.CompileError, "the key 3 is no text"),
        ({"w": {"a": np.zeros(4, complex)}}, sf.CompileError, "`a` has the dtype complex128"),
        ({"w": {"b": np.zeros(4, np.float32)}}, sf.CompileError, "have no `a`"),
    ],
)
def test_wrong_weights(given: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        sf.compile(SCALED, weights=given)


def test_weights_that_are_a_pipe_or_of_an_unknown_dtype(tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text(SCALED)
    os.mkfifo(tmp_path / "w.npz")
    with pytest.raises(sf.CompileError, match="no regular file"):
        sf.compile(path)
    (tmp_path / "w.npz").unlink()
    np.savez(tmp_path / "w.npz", a=np.zeros(4, "M8[s]"))
    with pytest.raises(sf.CompileError, match="`a` has the dtype <M8"):
        sf.compile(path)


def test_an_index_out_of_range_names_the_size_of_the_axis(tmp_path: Path) -> None:
    pipe = compiled(tmp_path, "pipeline p(x: f32[A, B], i: i64[N], j: i64[N]):\n    x[i, j]\n")
    x = np.zeros((3, 4), np.float32)
    for i, j, said in ((3, 0, "it is 3, the axis has size 3"), (0, -5, "it is -5.*has size 4")):
        with pytest.raises(sf.IndexOutOfRange, match=said) as found:
            pipe(x=x, i=np.array([i]), j=np.array([j]))
        assert found.value.line == 2


@pytest.mark.parametrize(
    "body", ["x[i]", "y[k] = x[i[k]]\n    y", "x[i[0] : i[0] + 1]", "scatter_add(x, i, ones([K]))"]
)
def test_unsigned_positions_beyond_i64_are_out_of_range(tmp_path: Path, body: str) -> None:
    head = "pipeline p(x: f32[N], i: u64[K])\nwhere N >= 1, K == 1:\n"
    pipe = compiled(tmp_path, f"{head}    {body}\n")
    x = np.arange(5, dtype=np.float32)
    for at in (5, 1 << 63, (1 << 64) - 1):
        with pytest.raises(sf.IndexOutOfRange, match="the axis has size 5"):
            pipe(x=x, i=np.array([at], np.uint64))
    assert np.ravel(pipe(x=x, i=np.array([4], np.uint64)))[-1] in (4, 5)


def test_a_position_of_positions_is_not_that_of_the_elements(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    pipe = compiled(tmp_path, "pipeline p(x: i64[M, N]) where M >= 1, N >= 1:\n"
                              "    argmax(argmax(x, axis=0), axis=0), argmin(argmin(x, axis=1))\n")
    for shape in ((1, 5), (3, 7)):
        x = rng.integers(-9, 9, shape)
        found = pipe(x=x)
        assert (found[0], found[1]) == (x.argmax(0).argmax(0), x.argmin(1).argmin())


@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_a_copied_base_and_what_is_updated_in_it_are_two_results(device: str) -> None:
    text = "    a = y[x[0] : x[0] + 1]\n    b = a\n    b[x % 1] = x\n    a, b\n"
    with sf.compile(f"pipeline p(x: i64[5], y: i64[5]):\n{text}", device=device) as pipe:
        found = pipe(x=np.arange(5)[::-1].copy(), y=10 * np.arange(5))
    assert [a.tolist() for a in found] == [[40], [0]]


@pytest.mark.parametrize("dtype", ["f32", "f8e4m3", "f64", "i8"])
def test_integers_that_no_number_of_the_dtype_is_near(dtype: str) -> None:
    with sf.compile(f"pipeline p(x: {dtype}) -> {dtype}:\n    x\n") as pipe:
        assert float(pipe(x=7)) == 7
        for value, said in ((10**400, "of 1329 bits"), (-(10**5000), "of 16610 bits")):
            with pytest.raises(sf.InputError, match=f"an integer {said}, but p takes {dtype}"):
                pipe(x=value)


def test_a_quotient_and_a_remainder_by_a_size_of_0_are_0() -> None:
    text = "pipeline p(x: f32[M], n: f32[N]):\n    y[i in 0..N] = M * (i // M) + i % M\n    y\n"
    with sf.compile(text) as pipe:
        for m, found in ((0, [0] * 5), (3, [*range(5)])):
            assert pipe(x=np.zeros(m, np.float32), n=np.zeros(5, np.float32)).tolist() == found


@pytest.mark.parametrize(
    "text",
    [
        "pipeline p(x: f32[N], y: f32[M]) -> f32[M*(N//M) + N%M]:\n    x[:M * (N // M) + N % M]\n",
        "pipeline p(x: f32[N], y: f32[M]) -> f32[M*(N//M) + N%M]:\n"
        "    z[i in 0..M*(N//M) + N%M] = x[i]\n    z\n",
    ],
)
def test_sizes_of_a_quotient_and_a_remainder_by_0_are_0(text: str) -> None:
    x = np.arange(5, dtype=np.float32)
    with sf.compile(text) as pipe:
        for m in (0, 2, 7):
            assert np.array_equal(pipe(x=x, y=np.zeros(m, np.float32)), x[: 5 if m else 0])


@pytest.mark.parametrize(
    "result, body",
    [("M, N//M", "reshape(x, [M, N//M])"), ("M*(N//M)", "x"), ("M*(N//M) + N%M", "x")],
)
def test_a_size_of_0_divides_0_alone(result: str, body: str) -> None:
    """What follows of `N % M == 0` does not hold where N is left out by a quotient by 0."""
    head = f"pipeline p(x: f32[N], y: f32[M]) -> f32[{result}]\nwhere N % M == 0:\n"
    text = f"{head}    {body} + 1.0\n"
    with sf.compile(text) as pipe:
        for n, m in ((6, 2), (0, 0), (6, 6)):
            found = pipe(x=np.zeros(n, np.float32), y=np.zeros(m, np.float32))
            assert found.size == n
        with pytest.raises(sf.InputError, match="here N = 5, M = 0"):
            pipe(x=np.zeros(5, np.float32), y=np.zeros(0, np.float32))


def test_the_name_of_a_size_may_be_long(tmp_path: Path) -> None:
    """Plans limit the length of formulas, in which a name counts as one character."""
    name = "N" * 30_000
    text = f"pipeline p(x: f32[{name}], y: f32[2 * {name} + 1]):\n    concat([x, y[1:]])\n"
    with compiled(tmp_path, text) as pipe:
        found = pipe(x=np.ones(2, np.float32), y=np.arange(5, dtype=np.float32))
    assert found.tolist() == [1, 1, 1, 2, 3, 4]


def test_a_garbage_collection_during_a_call_makes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an object does that calls a pipeline when it goes."""
    pipe = sf.compile("pipeline p(x: f32[4]):\n    x + 1.0\n", device="emulator")
    run, found = EmulatorDriver._run, list[list[float]]()

    def collects(driver: EmulatorDriver, launch: Any) -> Any:
        if not found:
            found.append([])
            found[0] = pipe(x=np.ones(4, np.float32)).tolist()
        return run(driver, launch)

    monkeypatch.setattr(EmulatorDriver, "_run", collects)
    zeros = np.zeros(4, np.float32)
    call = Thread(target=lambda: found.append(pipe(x=zeros).tolist()), daemon=True)
    call.start()
    call.join(10)
    assert found == [[2.0] * 4, [1.0] * 4]
