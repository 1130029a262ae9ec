"""Arrays of other libraries in and out, by DLPack, without copies and without importing them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime import interchange
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.errors import InputError

from . import handmade


class Foreign:
    """Another library's array: only DLPack, on any device."""

    def __init__(self, array: np.ndarray[Any, Any], device: int = 1) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.device, 0)


def test_any_dlpack_array_is_read_without_a_copy() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.shares_memory(interchange.view(Foreign(x), "input `x`"), x)
    with CpuPipeline(handmade.plan(), "affine") as pipeline:
        for given in (x, x.T.copy().T):
            np.testing.assert_array_equal(pipeline(x=Foreign(given)).y, handmade.expected(x)[0])


def test_other_devices_are_refused() -> None:
    with pytest.raises(InputError, match=r"`x` is a .*Foreign on another device.*\n.*cpu"):
        interchange.view(Foreign(np.zeros(3), device=2), "input `x`")


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    with CpuPipeline(handmade.plan(), "affine") as pipeline:
        found = pipeline(x=x)
        assert isinstance(found.y, torch.Tensor) and found.y.dtype == torch.float32
        np.testing.assert_array_equal(found.y.numpy(), handmade.expected(x.numpy())[0])
        found.y.add_(1)
        np.testing.assert_array_equal(pipeline(x=x.T.contiguous().T).z, found.z)
        out = (torch.empty(2, 3), torch.empty(2, 3))
        assert pipeline(x=x, out=out) is out
        assert torch.equal(out[0] + 1, found.y)
        wide = torch.zeros(4, 3)
        pipeline(x=x, out=(wide[::2], out[1]))
        assert torch.equal(wide[::2], out[0]) and not wide[1::2].any()
        large = torch.ones(1, 3000)
        kept = pipeline(x=large).y[0, 1:5]
        again = pipeline(x=2 * large)
        assert torch.equal(kept, torch.tensor([3.0, 4.0, 2.0, 3.0])) and again.y[0, 0] == 3
        with pytest.raises(InputError, match="requires? grad"):
            pipeline(x=x.clone().requires_grad_())
        with pytest.raises(InputError, match=r"dtype f64.*\n.*`x\.to\(torch\.float32\)`"):
            pipeline(x=x.double())
        with pytest.raises(InputError, match="out=: this torch.Tensor"):
            pipeline(x=x, out=(torch.empty(2, 3, requires_grad=True), out[1]))
        minus = torch.complex(x, x).conj().imag  # negative by a bit of the tensor's own
        assert minus.is_neg() and torch.equal(pipeline(x=minus).y, pipeline(x=-x).y)


def test_jax_in_jax_out(tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    path = tmp_path / "p.pipe"
    path.write_text("pipeline p(x: bf16[N], y: f8e4m3[N]):\n    x * 2.0, y, f32(x)\n")
    with sf.compile(path) as pipeline:
        for size in (3, 0):
            x, y = jax.numpy.ones(size, "bfloat16"), jax.numpy.ones(size, "float8_e4m3fn")
            found = pipeline(x=x, y=y)
            assert all(isinstance(z, jax.Array) for z in found)
            assert [z.dtype for z in found] == [x.dtype, y.dtype, "float32"]
            assert (found[0] == 2).all() and (found[1] == 1).all() and (found[2] == 1).all()
        with pytest.raises(InputError, match="which is never written to"):
            pipeline(x=x, y=y, out=found)


class jaxlib_array(Foreign):  # noqa: N801
    """What says that it is of a library whose arrays never change."""

    __module__ = "jaxlib"


def test_arrays_that_never_change_are_no_target() -> None:
    x = np.zeros((2, 3), np.float32)
    with CpuPipeline(handmade.plan(), "affine") as pipeline:
        with pytest.raises(InputError, match="out= is a jaxlib.* never written to\n.*help"):
            pipeline(x=x, out=(jaxlib_array(x), jaxlib_array(x)))


def test_out_of_foreign_byte_order() -> None:
    x = np.zeros((2, 3), np.float32)
    with CpuPipeline(handmade.plan(), "affine") as pipeline:
        with pytest.raises(InputError, match=r"float32\[2, 3\] in foreign byte order, but"):
            pipeline(x=x, out=(x.astype(">f4"), x.copy()))


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_torch_dtypes(name: str) -> None:
    pytest.importorskip("torch")
    array = np.arange(4).astype(DTYPES[name].numpy)
    tensor = interchange._to_torch(array)
    assert tensor.data_ptr() == array.ctypes.data
    back = interchange.view(tensor, "input `x`")
    assert back.dtype == array.dtype and back.ctypes.data == array.ctypes.data


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, numpy as np; from stagefuse.runtime import interchange, pipeline\n"
        "assert interchange.importer(np.zeros(2)) is None or True\n"
        "assert not {'torch', 'jax', 'lark', 'networkx', 'llvmlite'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
