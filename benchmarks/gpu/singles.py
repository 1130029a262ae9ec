"""Single operations beside PyTorch's: sorts, scatters, gathers, running sums, reductions, index
maps, and recurrences beside cuDNN's.

`python -m benchmarks.gpu.singles [--only sort]` prints a table in Markdown. Sizes are unknown
while compiling, but for those that shape a kernel (k of `topk`, units of a recurrence). Random
data, times on the GPU alone, medians, the L2 cache overwritten before each call, engines in turn;
each result is compared with PyTorch's first, which sums in f64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from stagefuse.compiler.plan import Plan
from stagefuse.runtime.cuda import found
from stagefuse.runtime.devices import open_plan

from .environment import clocks, environment
from .measure import Gpu, Run, checked, in_turns
from .plans import plans_of

TOLERANCE = 2e-5
"""Of the largest element of a result: f32 beside f64. Of what is only moved it is nothing."""


@dataclass(frozen=True)
class Floats:
    """An input of f32 from 0 to 1, of a shape."""

    shape: tuple[int, ...]

    def made(self, gpu: Gpu) -> Any:
        return gpu.torch.rand(self.shape, device=gpu.device)


@dataclass(frozen=True)
class Integers:
    """An input of i64 from 0 to before `end`, of a shape."""

    end: int
    shape: tuple[int, ...]

    def made(self, gpu: Gpu) -> Any:
        return gpu.torch.randint(0, self.end, self.shape, device=gpu.device)


@dataclass(frozen=True)
class Given:
    """An input that is a tensor on the GPU already."""

    tensor: Any

    def made(self, gpu: Gpu) -> Any:
        return self.tensor


@dataclass(frozen=True)
class Case:
    """`peer` is what PyTorch makes of the inputs, and `exact` the same in f64."""

    name: str
    source: str
    inputs: Mapping[str, Floats | Integers | Given]
    peer: Callable[..., Any]
    exact: Callable[..., Any] | None = None


def sorts(torch: Any) -> Iterator[Case]:
    def sort(x: Any) -> Any:
        return torch.sort(x, stable=True)[0]

    for count in (1000, 100_000, 1_000_000, 10_000_000):
        source = "pipeline p(x: f32[N]) -> f32[N]:\n    sort(x)\n"
        yield Case(f"sort {count}", source, {"x": Floats((count,))}, sort)
    for rows, length in ((4096, 256), (4096, 1024), (64, 100_000)):
        source = "pipeline p(x: f32[R, N]) -> f32[R, N]:\n    sort(x, axis=1)\n"
        yield Case(f"sort {rows} x {length}", source, {"x": Floats((rows, length))}, sort)
    for rows, length in ((1, 1_000_000), (4, 131_072)):
        source = (
            "pipeline p(x: f32[R, N]) -> f32[R, 50] where N >= 50:\n"
            "    y, at = topk(x, 50)\n    y\n"
        )
        yield Case(
            f"first 50 of {rows} x {length}", source, {"x": Floats((rows, length))},
            lambda x: torch.topk(x, 50)[0],
        )  # fmt: skip


def places(torch: Any) -> Iterator[Case]:
    """What is read and written where data says."""
    for target, updates, width in (
        (1_000_000, 1_000_000, 1), (256, 1_000_000, 1), (1000, 10_000, 1), (30_000, 8192, 768),
    ):  # fmt: skip
        yield Case(
            f"scatter_add {updates} x {width} into {target}",
            "pipeline p(x: f32[N, D], i: i64[M], u: f32[M, D]) -> f32[N, D]:\n"
            "    scatter_add(x, i, u)\n",
            {
                "x": Floats((target, width)), "i": Integers(target, (updates,)),
                "u": Floats((updates, width)),
            },
            lambda x, i, u: x.index_add(0, i, u),
            lambda x, i, u: x.double().index_add(0, i, u.double()),
        )  # fmt: skip
    for target in (100_000, 256):
        yield Case(
            f"scatter_add 1000000 i64 into {target}",
            "pipeline p(x: i64[N], i: i64[M], u: i64[M]) -> i64[N]:\n    scatter_add(x, i, u)\n",
            {
                "x": Integers(9, (target,)), "i": Integers(target, (1_000_000,)),
                "u": Integers(9, (1_000_000,)),
            },
            lambda x, i, u: x.index_add(0, i, u),
        )  # fmt: skip
    for rows, width, count in ((100_000, 64, 1_000_000), (50_000, 768, 16_384)):
        yield Case(
            f"gather {count} of {rows} x {width}",
            "pipeline p(x: f32[N, D], i: i64[M]) -> f32[M, D]:\n    x[i]\n",
            {"x": Floats((rows, width)), "i": Integers(rows, (count,))},
            lambda x, i: x[i],
        )


def rows(torch: Any) -> Iterator[Case]:
    for count, length in ((1, 10_000_000), (16, 1_000_000), (4096, 4096)):
        make = {"x": Floats((count, length))}
        for name, result in (("sum", "f32"), ("max", "f32"), ("argmax", "i64")):
            source = (
                f"pipeline p(x: f32[R, N]) -> {result}[R] where N >= 1:\n    {name}(x, axis=1)\n"
            )
            peer = partial(_along, getattr(torch, "amax" if name == "max" else name), 1)
            exact = partial(_exactly, torch.sum, 1) if name == "sum" else None
            yield Case(f"{name} of {count} x {length}", source, make, peer, exact)
    for count, length in ((1, 10_000_000), (16, 1_000_000)):
        source = "import nn\npipeline p(x: f32[R, N]) -> f32[R, N]:\n    nn.softmax(x)\n"
        peer, exact = partial(_along, torch.softmax, 1), partial(_exactly, torch.softmax, 1)
        name = f"softmax of {count} x {length}"
        yield Case(name, source, {"x": Floats((count, length))}, peer, exact)
    for axis, count, length in ((1, 1, 10_000_000), (1, 4096, 4096), (0, 4096, 4096)):
        source = f"pipeline p(x: f32[R, N]) -> f32[R, N]:\n    cumsum(x, axis={axis})\n"
        peer, exact = partial(_along, torch.cumsum, axis), partial(_exactly, torch.cumsum, axis)
        name = f"running sums of {count} x {length} along {axis}"
        yield Case(name, source, {"x": Floats((count, length))}, peer, exact)
    yield Case(
        "transpose 8192 x 8192",
        "pipeline p(x: f32[R, N]) -> f32[N, R]:\n    transpose(x, [1, 0])\n",
        {"x": Floats((8192, 8192))}, lambda x: x.t().contiguous(),
    )  # fmt: skip


def recurrences(torch: Any) -> Iterator[Case]:
    for units, batch in ((128, 1), (128, 16), (256, 1), (256, 16), (512, 1), (512, 16)):
        layer = torch.nn.LSTM(units, units).cuda()
        names = {"w": "weight_ih_l0", "r": "weight_hh_l0", "b": "bias_ih_l0", "c": "bias_hh_l0"}
        weights = {n: Given(getattr(layer, name).detach()) for n, name in names.items()}
        yield Case(
            f"LSTM of {units} units, 512 steps, {batch}",
            f"import nn\npipeline p(x: f32[T, B, {units}], w: f32[{4 * units}, {units}], "
            f"r: f32[{4 * units}, {units}], b: f32[{4 * units}], c: f32[{4 * units}])"
            f" -> f32[T, B, {units}]:\n"
            "    y, _, _ = nn.lstm_steps(x @ transpose(w, [1, 0]) + b + c, r)\n    y\n",
            {"x": Floats((512, batch, units)), **weights},
            partial(_first, layer),
        )  # fmt: skip


def _first(layer: Any, x: Any, **weights: Any) -> Any:
    return layer(x)[0]


def _along(operation: Any, axis: int, x: Any) -> Any:
    return operation(x, axis)


def _exactly(operation: Any, axis: int, x: Any) -> Any:
    return operation(x.double(), axis)


FAMILIES = {"sorts": sorts, "places": places, "rows": rows, "recurrences": recurrences}


def measured(gpu: Gpu, case: Case, plan: Plan, rounds: int) -> dict[str, float]:
    """Seconds of each engine. Raises ValueError for one whose result is wrong."""
    given = {name: kind.made(gpu) for name, kind in case.inputs.items()}
    wanted = (case.exact or case.peer)(**given)

    def error(result: Any) -> float:
        away = (result.double() - wanted.double()).abs().max()
        return float(away / wanted.double().abs().max())

    def runs() -> Iterator[tuple[str, Run]]:
        pipe = open_plan(plan, None, "cuda:0")
        out = gpu.torch.empty_like(case.peer(**given))
        on = pipe.on(gpu.stream)
        yield "stagefuse", lambda: on(out=out, **given)
        yield "PyTorch", lambda: case.peer(**given)

    return in_turns(gpu, checked(gpu, runs(), error, TOLERANCE), rounds, 5)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.singles", description=__doc__)
    parser.add_argument("--only", type=lambda t: t.split(","), default=list(FAMILIES),
                        help=f"of {', '.join(FAMILIES)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    gpu = Gpu("cuda:0")
    print("; ".join(f"{k} {v}" for k, v in {**environment(), **clocks()}.items()), "\n")
    print("| | stagefuse | PyTorch | ratio |\n|---|---|---|---|")
    cases = [case for family in options.only for case in FAMILIES[family](gpu.torch)]
    plans = plans_of([case.source for case in cases], found.arch_of(0))
    for case, plan in zip(cases, plans, strict=True):
        ours, theirs = measured(gpu, case, plan, options.rounds).values()
        print(f"| {case.name} | {ours * 1e6:.1f} | {theirs * 1e6:.1f} | {ours / theirs:.2f} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
