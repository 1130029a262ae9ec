"""What `test_cuda_bindings` runs in a process whose libcuda is the stub: one case by name."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16 as BF16

import stagefuse as sf
from stagefuse.compiler.driver import compile_file
from stagefuse.runtime.cuda import calls, found
from stagefuse.runtime.devices import open_plan

from . import handmade, handmade_gpu, stub_gpu


class Array:
    """An array on the stub GPU, whose memory is this machine's, by one of the two interfaces."""

    def __init__(self, content: np.ndarray[Any, Any]) -> None:
        self.content = content
        stub_gpu.foreign[content.ctypes.data] = content.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.content.shape, "typestr": self.content.dtype.str, "version": 3,
            "data": (self.content.ctypes.data, False), "strides": None, "stream": None,
        }  # fmt: skip


class Capsule:
    """A result handed on by DLPack only."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.streams: list[Any] = []

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        self.streams.append(stream)
        return self.result.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self) -> Any:
        return self.result.__dlpack_device__()


def content(array: Any) -> np.ndarray[Any, Any]:
    count = int(np.prod(array.shape))
    flat = np.ctypeslib.as_array((ctypes.c_float * count).from_address(array.address))
    return flat.reshape(array.shape)


def check(results: Any, x: np.ndarray[Any, Any]) -> None:
    for ours, expected in zip(results, handmade_gpu.expected(x), strict=True):
        np.testing.assert_array_equal(ours, expected)


def batch(shape: tuple[int, int] = (3, 30)) -> np.ndarray[Any, Any]:
    return np.random.default_rng().standard_normal(shape, np.float32)


def calls_and_map() -> None:
    assert [str(g) for g in found.gpus()] == ["Stub GPU (compute capability 9.0)"]
    assert calls.driver_version() == (13, 1)
    for cubins in ({}, None):
        plan = handmade_gpu.plan() if cubins is None else handmade_gpu.plan(cubins=cubins)
        with open_plan(plan, "affine", "cuda:0") as pipe:
            x = batch()
            check(pipe(x=x), x)
            check(pipe(x=np.asfortranarray(x)), x)
            batches = [batch((1 + i % 4, 6)) for i in range(9)]
            for result, x in zip(pipe.map({"x": b} for b in batches), batches, strict=True):
                check(result, x)


def arrays_of_others() -> None:
    with open_plan(handmade_gpu.plan(), "affine", "cuda:0") as pipe:
        x = batch()
        first = pipe(x=Array(x))
        check([content(first.y), content(first.z)], x)
        capsule = Capsule(first.y)
        second = pipe(x=capsule)
        assert len(capsule.streams) == 1 and capsule.streams[0] > 2
        check([content(second.y), content(second.z)], content(first.y))
        empty = pipe(x=Array(np.zeros((0, 3), np.float32)))
        assert empty.y.shape == (0, 3)
        assert pipe(x=Capsule(empty.y)).y.shape == (0, 3)
        y, z = Array(np.empty_like(x)), Array(np.empty_like(x))
        pipe(x=first.y, out=(y, z))
        check([y.content, z.content], content(first.y))
        with pipe.driver.active():  # type: ignore[attr-defined]
            stream = calls.stream()
        on = pipe.on(stream)
        third = on(x=first.y)
        check([content(third.y), content(third.z)], content(first.y))
        held = third.y.__dlpack__(stream=None, max_version=(1, 0))
        del first, second, third, capsule, held, empty
        gc.collect()
        with pipe.driver.active():  # type: ignore[attr-defined]
            calls.close_stream(stream)


def launches() -> None:
    plan = handmade_gpu.affine("sm_90a")
    first, *rest = plan.launches
    wide = replace(first, grid=("2", "1", "1"), cluster=(2, 1, 1), shared_bytes="100000")
    big = replace(plan, launches=(wide, *rest))
    whole = handmade_gpu.plan(replace(handmade.affine(), gpu=(big,)))
    with open_plan(whole, None, "cuda:0") as pipe:
        x = batch()
        check(pipe(x=x), x)


def tensor_maps() -> None:
    with open_plan(product("bf16"), None, "cuda:0") as pipe:
        for rows in (3, 0, 3, 130):
            x, w = batch((rows, 72)).astype(BF16), batch((72, 40)).astype(BF16)
            wide = x.astype(float) @ w.astype(float)
            np.testing.assert_allclose(pipe(x=x, w=w), wide, rtol=2**-8, atol=1e-3)
    with open_plan(product("bf16", "K"), None, "cuda:0") as pipe:
        for depth in (72, 71, 72):  # whose rows are moved if they are no multiple of 16 bytes
            x, w = batch((130, depth)).astype(BF16), batch((depth, 40)).astype(BF16)
            wide = x.astype(float) @ w.astype(float)
            np.testing.assert_allclose(pipe(x=x, w=w), wide, rtol=2**-8, atol=1e-3)
    with open_plan(product("f16"), None, "cuda:0") as pipe:  # arrays that lie elsewhere each time
        w = batch((72, 40)).astype(np.float16)
        several = [batch((130, 72)).astype(np.float16) for _ in range(2)]
        for x in several * 3:
            wide = x.astype(float) @ w.astype(float)
            found = content(pipe(x=Array(x), w=Array(w)))
            np.testing.assert_allclose(found, wide, rtol=2**-8, atol=1e-3)


def pixel_maps() -> None:
    with open_plan(windows(), None, "cuda:0") as pipe:
        x, w = batch((1, 64, 9, 150)), batch((64, 64, 3, 3))
        x, w = x.astype(np.float16), w.astype(np.float16)
        around = np.pad(x.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
        seen = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(2, 3))
        wanted = np.einsum("bcijmn,ocmn->bijo", seen, w.astype(float))
        np.testing.assert_allclose(pipe(x=x, w=w), wanted, rtol=2**-10, atol=1e-2)


def windows() -> Any:
    """The plan of a convolution whose kernel reads columns of pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "windows.pipe"
        path.write_text(
            "import nn\n"
            "pipeline windows(x: f16[1, 64, 9, 150], w: f16[64, 64, 3, 3]) -> f16[1, 9, 150, 64]:\n"
            "    x = pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])\n"
            "    transpose(nn.convolve2d(x, w, 1, 1, 1), [0, 2, 3, 1])\n"
        )
        plan = replace(compile_file(path, targets=["h100"]), cubins={})
    assert any(m.steps for x in plan.pipelines[0].gpu[0].launches for m in x.maps)
    return plan


def product(dtype: str, depth: str = "72") -> Any:
    """The plan of a product whose kernels read by tensor maps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.pipe"
        path.write_text(
            f"pipeline product(x: {dtype}[B, {depth}], w: {dtype}[{depth}, 40])"
            " -> f32[B, 40]:\n"
            "    f32(x @ w)\n"
        )
        return replace(compile_file(path, targets=["h100"]), cubins={})


def errors() -> None:
    with open_plan(handmade_gpu.plan(), "lookup", "cuda:0") as pipe:
        table = batch((1, 5))[0]
        try:
            pipe(table=table, ids=np.array([4, 5]))
        except sf.IndexOutOfRange as error:
            assert error.value == 5 and error.line == 7
        else:
            raise AssertionError
        np.testing.assert_array_equal(pipe(table=table, ids=np.array([4])), table[4:])
        try:
            pipe(table=np.zeros(1 << 25, np.float32), ids=np.array([4]))
        except sf.OutOfMemory as failure:
            assert "CUDA_ERROR_OUT_OF_MEMORY" in str(failure)
        else:
            raise AssertionError
        np.testing.assert_array_equal(pipe(table=table, ids=np.array([4])), table[4:])
    text = handmade_gpu.ptx("sm_90a")
    try:
        library = calls.open_context(0)
        calls.enter(library)
        calls.kernel(calls.load(text.encode() + b"\0"), "nothing")
    except sf.DeviceError as refused:
        assert "looking for the kernel nothing: CUDA_ERROR_NOT_FOUND: so says" in str(refused)
    else:
        raise AssertionError


def hidden() -> None:
    """No GPU, as with an empty CUDA_VISIBLE_DEVICES."""
    os.environ["STUB_CUDA_HIDDEN"] = "1"
    for _ in range(2):
        try:
            found.gpus()
        except sf.DeviceError as refused:
            assert "CUDA sees no GPU" in str(refused)
        else:
            raise AssertionError
    found.has_driver = lambda: True
    assert found.usable_device(handmade_gpu.plan()) is None and found.first_arch() is None


def own_tests() -> None:
    """The tests that are for a GPU, but for those that need PyTorch; few random programs."""
    as_text()
    few = ["-k", "not test_random_programs or mixed-0 or views-0"]
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-m", "gpu", *few, "tests/gpu"]) == 0


def comparison() -> None:
    """What `make gpu` compares, here the emulator with itself, by way of the driver."""
    from benchmarks.gpu import __main__ as command

    as_text()
    sys.argv = ["benchmarks.gpu", "--parts", "compare", "--dry", "--only", "W2a,W4,W6"]
    assert command.main() == 0


def as_text() -> None:
    """Take the stub for a GPU, and PTX where there is machine code too, which it can't run."""
    found.has_driver = lambda: True
    found._cubin_runs = lambda *_: False


def main() -> None:
    stub_gpu.install()
    every = (
        calls_and_map, arrays_of_others, launches, tensor_maps, pixel_maps, errors, hidden,
        own_tests, comparison,
    )  # fmt: skip
    cases = {f.__name__: f for f in every}
    cases[sys.argv[1]]()
    gc.collect()
    held = ctypes.CDLL("libcuda.so.1").stub_held
    held.restype = ctypes.c_int64
    print("held", held())


if __name__ == "__main__":
    main()
