"""Chains of convolutions in 16 bits or f32, each with a bias and relu, beside cuDNN with channels
last."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from .cases import TORCH, Case, Normal

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


def chain(torch: Any, kernels: list[Any], biases: list[Any], x: Any) -> Any:
    for kernel, bias in zip(kernels, biases, strict=True):
        padding = kernel.shape[-1] // 2
        x = torch.relu(torch.nn.functional.conv2d(x, kernel, bias, padding=padding))
    return x


def _array(torch: Any, tensor: Any) -> Any:
    tensor = tensor.cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _last(torch: Any, x: Any) -> dict[str, Any]:
    return {"x": x.to(memory_format=torch.channels_last)}


def convolutions(torch: Any) -> Iterator[Case]:
    torch.backends.cudnn.benchmark = True
    for sizes in SIZES:
        for kind in KINDS:
            batch, channels, places, window = sizes
            scale = (2 / (channels * window * window)) ** 0.5
            shape = (channels, channels, window, window)
            dtype = getattr(torch, TORCH[kind])
            kernels = [(torch.randn(shape, device="cuda") * scale).to(dtype) for _ in range(LAYERS)]
            biases = [(torch.randn(channels, device="cuda") * 0.1).to(dtype) for _ in range(LAYERS)]
            last = [k.to(memory_format=torch.channels_last) for k in kernels]
            weights = {f"k{n}": _array(torch, k) for n, k in enumerate(kernels)}
            weights |= {f"b{n}": _array(torch, b) for n, b in enumerate(biases)}
            yield Case(
                f"{kind} {', '.join(map(str, sizes))}",
                source(sizes, kind),
                {"x": Normal((batch, channels, places, places), TORCH[kind])},
                partial(chain, torch, last, biases),
                partial(_wide, torch, kernels, biases), for_peer=partial(_last, torch),
                weights=weights, tolerance=TOLERANCE,
                flops=2.0 * LAYERS * batch * (places * channels * window) ** 2,
            )  # fmt: skip


def _wide(torch: Any, kernels: list[Any], biases: list[Any], x: Any) -> Any:
    return chain(torch, [k.float() for k in kernels], [b.float() for b in biases], x.float())


FAMILIES = {"convolutions": convolutions}
