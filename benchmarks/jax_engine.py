"""JAX: a workload's formula compiled by XLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .engines import Bound, Engine
from .operations import Operations
from .workload import Workload


def _image_padding(size: int) -> list[tuple[int, int]]:
    return [(0, 0), (0, 0), (size, size), (size, size)]


class JaxOperations(Operations):
    relu = staticmethod(jax.nn.relu)
    silu = staticmethod(jax.nn.silu)
    softmax = staticmethod(jax.nn.softmax)

    def gelu(self, x: Any) -> Any:
        return jax.nn.gelu(x, approximate=False)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred * lax.rsqrt(variance + eps) * weight + bias

    def rms_norm(self, x: Any, weight: Any, eps: float = 1e-5) -> Any:
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        return jnp.concatenate(parts, axis)

    def split(self, x: Any, count: int) -> Any:
        return jnp.split(x, count, -1)

    def conv(self, x: Any, kernel: Any, bias: Any, stride: int, padding: int) -> Any:
        padded = jnp.pad(x, _image_padding(padding))
        return lax.conv(padded, kernel, (stride, stride), "VALID") + bias[:, None, None]

    def max_pool(self, x: Any) -> Any:
        window, strides = (1, 1, 3, 3), (1, 1, 2, 2)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, _image_padding(1))


class Jax(Engine):
    def bind(self, workload: Workload) -> Bound:
        operations, formula = JaxOperations(), workload.formula
        inputs, weights = jax.device_put(workload.inputs), jax.device_put(workload.weights)
        compiled = jax.jit(lambda x, w: formula(operations, x, w))
        return Bound(lambda: jax.block_until_ready(compiled(inputs, weights)))
