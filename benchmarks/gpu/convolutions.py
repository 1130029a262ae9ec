"""Chains of convolutions in 16 bits or f32: stagefuse, and cuDNN by PyTorch with channels last.

`python -m benchmarks.gpu.convolutions` prints a table in Markdown. A chain is `LAYERS` convolutions
of the same sizes, each with a bias and relu. Random data, times on the GPU alone, medians, the L2
cache overwritten before each call, engines in turn round by round; each result is compared with
PyTorch's in f32 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import stagefuse as sf

from .environment import clocks, environment
from .measure import Gpu, Run, checked, in_turns

LAYERS = 4
SIZES = [
    # batch, channels, places each way, window
    (1, 64, 56, 3), (1, 128, 28, 3), (1, 256, 14, 3), (1, 512, 7, 3),
    (32, 64, 56, 3), (32, 128, 28, 3), (32, 256, 14, 3), (32, 512, 7, 3),
    (32, 256, 56, 1), (8, 96, 57, 5),
]  # fmt: skip
KINDS = ("f16", "bf16", "f32")
TOLERANCE = 2**-6  # of the largest element, each layer rounding to 16 bits
Sizes = tuple[int, int, int, int]


def source(sizes: Sizes, kind: str) -> str:
    batch, channels, places, window = sizes
    edge = (window // 2, window // 2)
    image = f"{kind}[{batch}, {channels}, {places}, {places}]"
    layers = [
        f"    x = nn.relu(nn.convolve2d(pad(x, [(0, 0), (0, 0), {edge}, {edge}]), w.k{n}, 1, 1, 1)"
        f" + w.b{n}[:, None, None])\n"
        for n in range(LAYERS)
    ]
    head = f"import nn\nweights w = 'w.npz'\npipeline p(x: {image}) -> {image}:\n"
    return head + "".join(layers) + "    x\n"


def runs(gpu: Gpu, sizes: Sizes, kind: str, x: Any, w: dict[str, Any]) -> Iterator[tuple[str, Run]]:
    """What computes a chain, by engine; each gives its result."""
    torch = gpu.torch
    given = {name: tensor.cpu() for name, tensor in w.items()}
    if kind == "bf16":
        import ml_dtypes

        arrays = {n: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for n, t in given.items()}
    else:
        arrays = {n: t.numpy() for n, t in given.items()}
    pipe = sf.compile(source(sizes, kind), device="cuda:0", weights={"w": arrays})
    out = torch.empty_like(x)
    yield "stagefuse", partial(_into, pipe.on(gpu.stream), x, out)
    last = torch.channels_last
    kernels = [w[f"k{n}"].to(memory_format=last) for n in range(LAYERS)]
    image = x.to(memory_format=last)
    torch.backends.cudnn.benchmark = True
    yield "cuDNN", partial(chain, torch, image, kernels, [w[f"b{n}"] for n in range(LAYERS)])


def chain(torch: Any, x: Any, kernels: list[Any], biases: list[Any]) -> Any:
    for kernel, bias in zip(kernels, biases, strict=True):
        padding = kernel.shape[-1] // 2
        x = torch.relu(torch.nn.functional.conv2d(x, kernel, bias, padding=padding))
    return x


def _into(run: Callable[..., Any], x: Any, out: Any) -> Any:
    run(x=x, out=out)
    return out


def measured(gpu: Gpu, sizes: Sizes, kind: str, rounds: int) -> dict[str, float]:
    """Seconds of each engine. Raises ValueError for one whose result is wrong."""
    torch, (batch, channels, places, window) = gpu.torch, sizes
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[kind]
    x = torch.randn(batch, channels, places, places, device=gpu.device).to(dtype)
    scale = (2 / (channels * window * window)) ** 0.5
    w = {}
    for n in range(LAYERS):
        kernel = torch.randn(channels, channels, window, window, device=gpu.device) * scale
        w[f"k{n}"] = kernel.to(dtype)
        w[f"b{n}"] = (torch.randn(channels, device=gpu.device) * 0.1).to(dtype)
    wide = [[w[f"{name}{n}"].float() for n in range(LAYERS)] for name in "kb"]
    wanted = chain(torch, x.float(), *wide)

    def error(y: Any) -> float:
        return float((y.float() - wanted).abs().max() / wanted.abs().max())

    return in_turns(gpu, checked(gpu, runs(gpu, sizes, kind, x, w), error, TOLERANCE), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.convolutions", description=__doc__
    )
    parser.add_argument("--kinds", type=lambda t: t.split(","), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    gpu = Gpu("cuda:0")
    print("; ".join(f"{k} {v}" for k, v in {**environment(), **clocks()}.items()), "\n")
    print(
        "| batch, channels, places, window | | stagefuse | cuDNN | TFLOP/s |\n" + "|---" * 5 + "|"
    )
    for sizes in SIZES:
        for kind in options.kinds:
            times = measured(gpu, sizes, kind, options.rounds)
            batch, channels, places, window = sizes
            work = 2 * LAYERS * batch * (places * channels * window) ** 2
            listed = " | ".join(f"{t * 1e6:.1f}" for t in times.values())
            rate = work / times["stagefuse"] / 1e12
            shown = ", ".join(map(str, sizes))
            print(f"| {shown} | {kind} | {listed} | {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
