"""Single operations and parts of networks beside PyTorch's, cuBLAS's and cuDNN's.

    python -m benchmarks.gpu.cases [--only sorts,products] [--match 4096] [--kernels]

prints a table in Markdown. Random data that lie on the GPU, times there alone, medians, the L2
cache overwritten before each call, engines in turn; each result is compared first with what it
should be. Plans are compiled before, as many at once as there are cores. A result that is wrong, or
what fails, is said in its row, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from stagefuse.compiler.plan import Plan
from stagefuse.runtime.cuda import found
from stagefuse.runtime.devices import open_plan

from .environment import environment
from .kernels import CALLS, LONGEST_NAME, profiled
from .measure import Gpu, Run, checked, in_turns
from .plans import plans_of

TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i8": "int8",
         "f8e4m3": "float8_e4m3fn"}  # fmt: skip
"""PyTorch's names of dtypes."""


@dataclass(frozen=True)
class Uniform:
    """An input of f32 from 0 to 1, of a shape."""

    shape: tuple[int, ...]

    def made(self, gpu: Gpu) -> Any:
        return gpu.torch.rand(self.shape, device=gpu.device)


@dataclass(frozen=True)
class Normal:
    """An input of a normal distribution; `dtype` is PyTorch's name. Bytes of f8 are of numbers
    up to 448 or so."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def made(self, gpu: Gpu) -> Any:
        return gpu.torch.randn(self.shape, device=gpu.device).to(getattr(gpu.torch, self.dtype))


@dataclass(frozen=True)
class Integers:
    """An input of whole numbers from `begin` to before `end`, of a shape."""

    end: int
    shape: tuple[int, ...]
    dtype: str = "int64"
    begin: int = 0

    def made(self, gpu: Gpu) -> Any:
        kind = getattr(gpu.torch, self.dtype)
        return gpu.torch.randint(self.begin, self.end, self.shape, device=gpu.device, dtype=kind)


@dataclass(frozen=True)
class Given:
    """An input that is a tensor on the GPU already."""

    tensor: Any

    def made(self, gpu: Gpu) -> Any:
        return self.tensor


def whole(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Case:
    """`peer` is what PyTorch makes of the inputs, a tensor or several; `exact` the same in f64, of
    the `part` of results that is compared. `weights` are constants, by the names that the source
    has below `w`. `tolerance` is of the largest element of a result: the default is of f32 beside
    f64, and of what is only moved it is nothing. `flops` are operations in a call."""

    name: str
    source: str
    inputs: Mapping[str, Uniform | Normal | Integers | Given]
    peer: Callable[..., Any]
    exact: Callable[..., Any] | None = None
    part: Callable[[Any], Any] = whole
    for_peer: Callable[..., Mapping[str, Any]] = dict
    weights: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-5
    flops: float = 0.0


@dataclass(frozen=True)
class Times:
    """Seconds of both, the bytes of inputs, constants and results, and what the profiler says of
    each kernel in microseconds."""

    ours: float
    theirs: float
    moved: int
    kernels: Mapping[str, list[float]]


def measured(gpu: Gpu, case: Case, plan: Plan, rounds: int, kernels: bool = False) -> Times:
    """Raises ValueError for an engine whose result is wrong."""
    given = {name: kind.made(gpu) for name, kind in case.inputs.items()}
    theirs = case.for_peer(**given)
    wanted = _listed(case.exact(**given) if case.exact else case.peer(**theirs))
    out = [gpu.torch.empty_like(r).contiguous() for r in _listed(case.peer(**theirs))]

    def error(result: Any) -> float:
        pairs = zip(_listed(result), wanted, strict=True)
        return max(_away(case.part(ours), exact) for ours, exact in pairs)

    with open_plan(plan, None, str(gpu.device)) as pipe:
        on = pipe.on(gpu.stream, defer_errors=True)  # PyTorch does not wait either

        def ours() -> Any:
            on(out=out if len(out) > 1 else out[0], **given)
            return out

        def runs() -> Iterator[tuple[str, Run]]:
            yield "stagefuse", ours
            yield "PyTorch", lambda: case.peer(**theirs)

        engines = checked(gpu, runs(), error, case.tolerance)
        times = in_turns(gpu, engines, rounds, 7)
        found = _of_kernels(gpu, plan, ours) if kernels else {}
    arrays = sum(a.nbytes for a in plan.arrays.values())
    moved = sum(t.numel() * t.element_size() for t in (*given.values(), *out)) + arrays
    return Times(times["stagefuse"], times["PyTorch"], moved, found)


def _of_kernels(gpu: Gpu, plan: Plan, run: Run) -> Mapping[str, list[float]]:
    """Microseconds of each kernel of the plan in some calls, by name."""
    own = {x.kernel[:LONGEST_NAME] for p in plan.pipelines for g in p.gpu for x in g.launches}
    return {name: times for name, times in profiled(gpu, run).items() if name in own}


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _away(result: Any, wanted: Any) -> float:
    wanted = wanted.double()
    largest = float(wanted.abs().max())
    return float((result.double() - wanted).abs().max()) / (largest or 1.0)


def families() -> Mapping[str, Callable[[Any], Iterator[Case]]]:
    """What yields the cases of a family, given PyTorch, by its name."""
    from . import attention, convolutions, products, singles

    found: dict[str, Callable[[Any], Iterator[Case]]] = {}
    for module in (singles, products, attention, convolutions):
        found |= module.FAMILIES
    return found


def main() -> int:
    known = families()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases", description=__doc__)
    parser.add_argument("--only", type=lambda t: t.split(","), default=list(known),
                        help=f"of {', '.join(known)}")  # fmt: skip
    parser.add_argument("--match", default="", help="cases with this in their name")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel too")
    options = parser.parse_args()
    gpu = Gpu("cuda:0")
    print("; ".join(f"{k} {v}" for k, v in environment().items()), "\n")
    cases = [c for f in options.only for c in known[f](gpu.torch) if options.match in c.name]
    plans = plans_of([(case.source, case.weights) for case in cases], found.arch_of(0))
    print("| | stagefuse | PyTorch | ratio | TFLOP/s | GB/s |", "|---" * 6 + "|", sep="\n")
    good = True
    for case, plan in zip(cases, plans, strict=True):
        try:
            if isinstance(plan, Exception):
                raise plan
            print(row(case, measured(gpu, case, plan, options.rounds, options.kernels)), flush=True)
        except Exception as failure:
            text = f"{type(failure).__name__}: {failure}".partition("\n")[0]
            print(f"| {case.name} | {text} |", flush=True)
            good = False
    return 0 if good else 1


def row(case: Case, times: Times) -> str:
    """The rate of operations where a case has them, and of bytes if each is moved once."""
    rate = f"{case.flops / times.ours / 1e12:.0f}" if case.flops else ""
    cells = [case.name, f"{times.ours * 1e6:.1f}", f"{times.theirs * 1e6:.1f}",
             f"{times.ours / times.theirs:.2f}", rate,
             f"{times.moved / times.ours / 1e9:.0f}"]  # fmt: skip
    said = [f"{name} {len(found) // CALLS} x {median(found):.1f}"
            for name, found in times.kernels.items()]  # fmt: skip
    return f"| {' | '.join([*cells, *(['; '.join(said)] if said else [])])} |"


if __name__ == "__main__":
    sys.exit(main())
