"""Pipelines on the fake GPU: fixtures and checks that several modules of tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stagefuse.runtime.cuda import arrays, driver, found, results
from stagefuse.runtime.device_pipeline import DevicePipeline
from stagefuse.runtime.devices import open_plan

from . import handmade_gpu
from .fake_code import noting
from .fake_cuda import FakeCuda
from .fake_tensor import FakeTensor


def installed(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, int, int, int]) -> FakeCuda:
    fake = FakeCuda(*gpus)
    standing_in(monkeypatch, fake)
    monkeypatch.setattr(driver.CudaDriver, "_node", noting(driver.CudaDriver._node))
    return fake


def standing_in(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    for module in (arrays, driver, found, results):
        monkeypatch.setattr(module, "calls", fake)


def opened(name: str, device: str = "cuda:0", **changes: Any) -> DevicePipeline:
    pipeline = open_plan(handmade_gpu.plan(**changes), name, device)
    assert isinstance(pipeline, DevicePipeline)
    return pipeline


def batch(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.random.default_rng().standard_normal(shape, np.float32)


def check(found: Any, x: np.ndarray[Any, Any]) -> None:
    for ours, expected in zip(found, handmade_gpu.expected(x), strict=True):
        array = ours if isinstance(ours, np.ndarray) else read(ours)
        np.testing.assert_array_equal(array, expected)


def read(array: Any, stream: int | None = None) -> Any:
    """A result on the GPU, read as another library would: by DLPack on its own stream."""
    fake: FakeCuda = arrays.calls  # type: ignore[assignment]
    own = fake.foreign_stream() if stream is None else stream
    tensor = array.__dlpack__(stream=own)
    assert isinstance(tensor, FakeTensor)
    return tensor.numpy(own)
