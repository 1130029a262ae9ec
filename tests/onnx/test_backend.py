"""The standard's own runner, and the other ways into a backend."""

from __future__ import annotations

import unittest
from typing import Any

import numpy as np
import onnx.backend.test
import pytest
from onnx import helper

from stagefuse.onnx import Backend, OnnxError

from . import models
from .models import F32, node

TRIED = ("relu", "gemm_default_scalar_bias", "clip_default_min", "top_k", "quantizelinear",
         "loop11", "shape_clip_end")  # fmt: skip
"""A few of each kind: `benchmarks/onnx_score.py` runs all."""


class Emulated(Backend):
    """The runner knows the devices CPU and CUDA: as CPU, what runs PTX."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> Any:
        return super().prepare(model, "EMULATOR", **kwargs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the runner's own data
@pytest.mark.parametrize("backend", [Backend, Emulated])
def test_the_standards_runner(backend: type[Backend]) -> None:
    runner = onnx.backend.test.BackendTest(backend, __name__)
    runner.include(f"^test_({'|'.join(TRIED)})_cpu$")
    result = unittest.TestResult()
    runner.test_suite.run(result)
    assert not result.errors and not result.failures
    assert result.testsRun - len(result.skipped) == len(TRIED)


def test_a_node_alone_on_each_device() -> None:
    x = np.array([-1.0, 2.0], np.float32)
    for device in ("CPU", "CPU:0", "EMULATOR"):
        (y,) = Backend.run_node(node("Relu", ["x"], ["y"]), [x], device)
        np.testing.assert_array_equal(y, [0, 2])
    with pytest.raises(ValueError, match="there is no device 'CUDA'"):
        Backend.run_node(node("Relu", ["x"], ["y"]), [x], "CUDA")
    with pytest.raises(onnx.checker.ValidationError):
        Backend.run_node(helper.make_node("Relu", ["x", "x"], ["y"]), [x, x])


def _of(op: str, element: int) -> onnx.ModelProto:
    made = models.model([node(op, ["x"], ["y"])], {"x": (element, ["N"])}, ["y"])
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", element, ["N"]))
    return made


def test_a_model_says_whether_it_can_be_run() -> None:
    made = _of("Neg", F32)
    assert Backend.is_compatible(made) and Backend.is_compatible(made, "EMULATOR")
    assert not Backend.is_compatible(made, "CUDA") and not Backend.supports_device("CUDA:1")
    (y,) = Backend.run_model(made, np.ones(3, np.float32))
    np.testing.assert_array_equal(y, [-1, -1, -1])
    strings = _of("Identity", onnx.TensorProto.STRING)
    assert not Backend.is_compatible(strings)
    with pytest.raises(OnnxError, match="strings are out of scope"):
        Backend.prepare(strings)
