"""Products of bf16 matrices: stagefuse, cuBLAS (`torch.matmul`) and `torch.compile(max-autotune)`.

`python -m benchmarks.gpu.products` prints a table in Markdown. Random data, times on the GPU alone,
medians, the L2 cache overwritten before each call, engines in turn round by round; each result is
compared with a product in f32 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import stagefuse as sf

from .environment import clocks, environment
from .measure import Gpu, Run, checked, in_turns

SIZES = [
    (1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192),
    (4000, 4104, 1000), (512, 4096, 4096), (4096, 512, 2048), (8192, 4096, 1024),
    (1, 14336, 4096), (16, 14336, 4096),
]  # fmt: skip
ENGINES = ("stagefuse", "cuBLAS", "torch.compile")
QUICK = ENGINES[:2]  # torch.compile tries kernels for minutes
TOLERANCE = 2**-7  # of the largest element: results are rounded to bf16


def source(m: int, n: int, k: int, transposed: bool) -> str:
    right = f"bf16[{n}, {k}]" if transposed else f"bf16[{k}, {n}]"
    w = "transpose(w, [1, 0])" if transposed else "w"
    return f"pipeline p(x: bf16[{m}, {k}], w: {right}) -> bf16[{m}, {n}]:\n    x @ {w}\n"


def runs(gpu: Gpu, x: Any, w: Any, transposed: bool, names: list[str]) -> Iterator[tuple[str, Run]]:
    """What multiplies two tensors, by engine; each gives its result."""
    torch = gpu.torch
    (m, k), n = x.shape, w.shape[0 if transposed else 1]

    def plain(x: Any, w: Any) -> Any:
        return torch.matmul(x, w.T if transposed else w)

    for name in names:
        if name == "stagefuse":
            pipe = sf.compile(source(m, n, k, transposed), device="cuda:0")
            out = torch.empty(m, n, dtype=x.dtype, device=gpu.device)
            yield name, partial(_into, pipe.on(gpu.stream), x, w, out)
        elif name == "cuBLAS":
            yield name, partial(plain, x, w)
        else:
            torch.compiler.reset()
            tuned = torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False)
            yield name, partial(tuned, x, w)


def _into(run: Callable[..., Any], x: Any, w: Any, out: Any) -> Any:
    run(x=x, w=w, out=out)
    return out


def measured(
    gpu: Gpu, size: tuple[int, int, int], transposed: bool, names: list[str], rounds: int
) -> dict[str, float]:
    """Seconds of each engine. Raises ValueError for one whose result is wrong."""
    torch, (m, n, k) = gpu.torch, size
    x = torch.randn(m, k, device=gpu.device).bfloat16()
    w = torch.randn((n, k) if transposed else (k, n), device=gpu.device).bfloat16()
    wide = x[:256].float() @ (w.T if transposed else w).float()

    def error(y: Any) -> float:
        return float((y[:256].float() - wide).abs().max() / wide.abs().max())

    return in_turns(gpu, checked(gpu, runs(gpu, x, w, transposed, names), error, TOLERANCE), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.products", description=__doc__)
    parser.add_argument("--engines", type=lambda t: t.split(","), default=list(QUICK),
                        help=f"of {', '.join(ENGINES)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    gpu = Gpu("cuda:0")
    print("; ".join(f"{k} {v}" for k, v in {**environment(), **clocks()}.items()), "\n")
    print("| m × n × k | right | " + " | ".join(options.engines) + " | TFLOP/s | GB/s |")
    print("|---" * (len(options.engines) + 4) + "|")
    for size in SIZES:
        for transposed in (False, True):
            times = measured(gpu, size, transposed, options.engines, options.rounds)
            listed = " | ".join(f"{t * 1e6:.1f}" for t in times.values())
            (m, n, k), first = size, next(iter(times.values()))
            rates = 2 * m * n * k / first / 1e12, 2 * (m * k + k * n + m * n) / first / 1e9
            right = "transposed" if transposed else "as is"
            print(f"| {' × '.join(map(str, size))} | {right} | {listed} | "
                  f"{rates[0]:.0f} | {rates[1]:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
