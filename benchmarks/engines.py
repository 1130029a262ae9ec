"""The engines side by side: stagefuse and its peers, each compiling a workload and running it.

A class is made with a number of threads and a level of x86-64, once for each workload; libraries
are imported when it is bound, in a process of its own.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from typing import TYPE_CHECKING, Any

import numpy as np

from .operations import Operations
from .workload import Array, Workload

if TYPE_CHECKING:
    from stagefuse.compiler.plan import Plan


@dataclass(frozen=True)
class Bound:
    """A compiled workload with its inputs: `run` is what is timed, `arrays` reads its results."""

    run: Callable[[], Any]
    arrays: Callable[[Any], list[Array]] = lambda results: [np.asarray(r) for r in results]


class Engine(ABC):
    """How one library compiles and runs workloads."""

    is_peer = True

    def __init__(self, threads: int, level: str) -> None:
        self.threads = threads
        self.level = level

    @abstractmethod
    def bind(self, workload: Workload) -> Bound:
        """Compile it, and give it inputs in the library's own form."""


class Stagefuse(Engine):
    is_peer = False

    def bind(self, workload: Workload) -> Bound:
        return self.bind_plan(self.plan(workload), workload)

    def plan(self, workload: Workload) -> Plan:
        """The workload compiled."""
        from stagefuse.compiler import driver, front
        from stagefuse.dsl.source import Source

        from .workload import PIPES

        given = {"w": workload.weights} if workload.weights else {}
        source = Source(f"{workload.family.pipe}.pipe", workload.source())
        program, found, load = front.check_text(source, PIPES, given)
        if found:
            raise ValueError("\n".join(str(f) for f in found))
        return driver.compile_program(program, load, None, levels=(self.level[:2],))

    def bind_plan(self, plan: Plan, workload: Workload) -> Bound:
        from stagefuse.runtime.cpu_pipeline import CpuPipeline

        tiles = self.level.endswith("amx")
        pipeline = CpuPipeline(plan, threads=self.threads, tiles=tiles)
        inputs = workload.inputs
        several = len(plan.pipelines[0].results) > 1
        return Bound(
            lambda: pipeline(**inputs),
            lambda results: list(results) if several else [results],
        )


class NumPy(Engine):
    def bind(self, workload: Workload) -> Bound:
        ops, formula = Operations(), workload.formula
        inputs, weights = workload.inputs, workload.weights
        return Bound(lambda: formula(ops, inputs, weights))


@dataclass(frozen=True)
class Entry:
    """Where an engine is, and the package that it needs."""

    home: str
    package: str

    def load(self) -> type[Engine]:
        module, _, name = self.home.partition(":")
        found: type[Engine] = getattr(importlib.import_module(f".{module}", __package__), name)
        return found

    @property
    def present(self) -> bool:
        return util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return "this tree"


ENGINES = {
    "stagefuse": Entry("engines:Stagefuse", "stagefuse"),
    "numpy": Entry("engines:NumPy", "numpy"),
    "onnxruntime": Entry("onnx_engines:OnnxRuntime", "onnxruntime"),
    "openvino": Entry("onnx_engines:OpenVino", "openvino"),
    "torch": Entry("torch_engines:Torch", "torch"),
    "torch.compile": Entry("torch_engines:TorchCompiled", "torch"),
    "jax": Entry("jax_engine:Jax", "jax"),
}

# What holds a peer's library to AVX2; ONNX Runtime and OpenVINO's own kernels take no such order.
AVX2_ENVIRONMENT = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
}
