"""The operations in which a workload's formula is written, on NumPy.

Every engine has such a set: its library's own functions where there are some, NumPy's composition
of them otherwise. In float64 this set is the meaning of a workload; in float32 it is a peer.
Axes are NumPy's; an image is [B, C, H, W]; the matrix of a linear layer is [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def erf(x: Any) -> Any:
    """SciPy's where there is one; a hundred times slower otherwise, which suits small tests."""
    try:
        from scipy.special import erf as fast
    except ImportError:
        return np.vectorize(math.erf, otypes=[x.dtype])(x)
    return fast(x)


def taps(size: int, target: int, dtype: Any) -> tuple[Any, Any, Any]:
    """The two source positions of each target position, and the second's part.

    Pixels are squares: centres lie at halves, and the outermost ones go on past the edge.
    """
    at = np.clip((np.arange(target) + 0.5) * size / target - 0.5, 0, size - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), (at - low).astype(dtype)


class Operations:
    """On NumPy arrays of one float dtype."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.dtype = dtype

    def gelu(self, x: Any) -> Any:
        return x * (erf(x * self.dtype(0.5**0.5)) + self.dtype(1)) * self.dtype(0.5)

    def relu(self, x: Any) -> Any:
        return np.maximum(x, 0)

    def silu(self, x: Any) -> Any:
        return x / (1 + np.exp(-x))

    def softmax(self, x: Any) -> Any:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + self.dtype(eps)) * weight + bias

    def rms_norm(self, x: Any, weight: Any, eps: float = 1e-5) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.dtype(eps)) * weight

    def matmul(self, a: Any, b: Any) -> Any:
        return a @ b

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        y = self.matmul(x, weight)
        return y if bias is None else y + bias

    def embed(self, table: Any, ids: Any) -> Any:
        return table[ids]

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        return x.reshape(shape)

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        return x.transpose(axes)

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        return np.concatenate(parts, axis)

    def split(self, x: Any, count: int) -> Any:
        """Equal parts of the last axis."""
        return np.split(x, count, -1)

    def attention(self, q: Any, k: Any, v: Any, heads: int, bias: Any = None) -> Any:
        """Of q, k, v [B, T, heads * D]; `bias` is added to the scores [B, heads, T, S]."""
        batch, length, width = q.shape
        part = width // heads

        def split(x: Any, axes: Sequence[int]) -> Any:
            return self.transpose(self.reshape(x, (batch, x.shape[1], heads, part)), axes)

        scores = self.matmul(split(q, (0, 2, 1, 3)), split(k, (0, 2, 3, 1))) * float(part**-0.5)
        weights = self.softmax(scores if bias is None else scores + bias)
        mixed = self.matmul(weights, split(v, (0, 2, 1, 3)))
        return self.reshape(self.transpose(mixed, (0, 2, 1, 3)), (batch, length, width))

    def conv(self, x: Any, kernel: Any, bias: Any, stride: int, padding: int) -> Any:
        edges = (padding, padding)
        padded = np.pad(x, ((0, 0), (0, 0), edges, edges))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[2:], (2, 3))
        windows = windows[:, :, ::stride, ::stride]
        batch, _, height, width = windows.shape[:4]
        columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(batch, -1, height * width)
        y = kernel.reshape(len(kernel), -1) @ columns + bias[:, None]
        return y.reshape(batch, len(kernel), height, width)

    def max_pool(self, x: Any) -> Any:
        """3 x 3, stride 2, padding 1, of an input that is not negative."""
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        return windows[:, :, ::2, ::2].max((4, 5))

    def mean_of_image(self, x: Any) -> Any:
        return x.mean((2, 3))

    def preprocess(self, image: Any, size: int, scale: Any, shift: Any) -> Any:
        """u8 [B, H, W, C] resized to size x size (bilinear), scaled by channel, channels first."""
        top, bottom, down = taps(image.shape[1], size, self.dtype)
        left, right, across = taps(image.shape[2], size, self.dtype)
        down, across = down[:, None, None], across[:, None]

        def row(y: Any) -> Any:
            line = image[:, y]
            return line[:, :, left] * (1 - across) + line[:, :, right] * across

        resized = row(top) * (1 - down) + row(bottom) * down
        return self.transpose(resized * scale + shift, (0, 3, 1, 2))
