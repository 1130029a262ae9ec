"""Tensors of a PyTorch that is a fake, on the fake GPU: read where they lie, in stream order."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.runtime.cuda import torch_tensors

from .cuda_run import batch, check, opened
from .fake_cuda import FakeCuda
from .fake_tensor import FakeTensor


class Tensor(FakeTensor):
    """What of torch.Tensor is asked for; `__dlpack__` must not be."""

    is_cuda, layout, requires_grad = True, "strided", False
    device = SimpleNamespace(index=0)
    kind = "float32"
    dtype = property(lambda self: f"torch.{self.kind}", lambda *_: None)  # type: ignore[assignment]

    def __dlpack__(self, **_: Any) -> FakeTensor:
        raise AssertionError

    def data_ptr(self) -> int:
        return self.address

    def is_contiguous(self) -> bool:
        return self.strides is None

    def stride(self) -> tuple[int, ...]:
        assert self.strides is not None
        return self.strides


@pytest.fixture()
def torch(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The fake module; `at` is its current stream."""
    fake = SimpleNamespace(Tensor=Tensor, strided="strided", at=cuda.foreign_stream())
    stream = SimpleNamespace(current_stream=lambda _: SimpleNamespace(cuda_stream=fake.at))
    fake.cuda = stream
    monkeypatch.setitem(sys.modules, "torch", fake)  # type: ignore[arg-type]
    torch_tensors._dtypes.clear()
    return fake


def tensor(cuda: FakeCuda, torch: SimpleNamespace, x: np.ndarray[Any, Any]) -> Tensor:
    """Filled by the current stream, with nothing that waits for it."""
    made = cuda.tensor(x, torch.at)
    return Tensor(cuda, made.address, made.shape, made.dtype, None)


def test_they_are_read_behind_the_current_stream(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    with opened("affine") as pipe:
        for _ in range(3):
            x = batch((2, 6))
            outs = tensor(cuda, torch, x), tensor(cuda, torch, x)
            pipe(x=tensor(cuda, torch, x), out=outs)
            found = [cuda.read(o.address, o.shape, np.float32, torch.at) for o in outs]
            check(found, x)
        assert "view" not in cuda.counts
        on = pipe.on(torch.at)  # nothing to order on one stream
        before = cuda.counts["record"]
        on(x=tensor(cuda, torch, x), out=outs)
        assert cuda.counts["record"] == before + 1  # behind the call itself
        found = [cuda.read(o.address, o.shape, np.float32, torch.at) for o in outs]
        check(found, x)


def test_what_is_refused(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    with opened("affine") as pipe:
        x = tensor(cuda, torch, batch((6, 3)))
        x.requires_grad = True
        with pytest.raises(sf.InputError, match="input `x`: this tensor requires a gradient"):
            pipe(x=x)
        x.requires_grad, x.kind = False, "complex64"
        with pytest.raises(sf.InputError, match="torch.complex64 is no dtype"):
            pipe(x=x)
        x.kind = "int32"
        with pytest.raises(sf.InputError, match="dtype i32"):
            pipe(x=x)
        x.kind, x.shape, x.strides = "float32", (3, 6), (1, 3)
        with pytest.raises(sf.InputError, match="dense"):
            pipe(x=x)
        x.device = SimpleNamespace(index=1)
        with pytest.raises(sf.InputError, match="memory of cuda:1"):
            pipe(x=x)
