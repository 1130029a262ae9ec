"""PyTorch: eager, and by torch.compile with its weights frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from .engines import Bound, Engine
from .workload import Workload


class TorchOperations:
    """Matrices of linear layers lie [out, in] here, as nn.Linear has them."""

    gelu = staticmethod(functional.gelu)
    relu = staticmethod(functional.relu)
    silu = staticmethod(functional.silu)
    linear = staticmethod(functional.linear)
    matmul = staticmethod(torch.matmul)
    reshape = staticmethod(torch.reshape)

    def softmax(self, x: Any) -> Any:
        return torch.softmax(x, -1)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Any:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def rms_norm(self, x: Any, weight: Any, eps: float = 1e-5) -> Any:
        return functional.rms_norm(x, x.shape[-1:], weight, eps)

    def embed(self, table: Any, ids: Any) -> Any:
        return functional.embedding(ids, table)

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        return torch.cat(list(parts), axis)

    def split(self, x: Any, count: int) -> Any:
        return x.chunk(count, -1)

    def attention(self, q: Any, k: Any, v: Any, heads: int, bias: Any = None) -> Any:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, bias)
        return mixed.transpose(1, 2).flatten(2)

    def conv(self, x: Any, kernel: Any, bias: Any, stride: int, padding: int) -> Any:
        return functional.conv2d(x, kernel, bias, stride, padding)

    def max_pool(self, x: Any) -> Any:
        return functional.max_pool2d(x, 3, 2, 1)

    def mean_of_image(self, x: Any) -> Any:
        return x.mean((2, 3))

    def preprocess(self, image: Any, size: int, scale: Any, shift: Any) -> Any:
        first = image.permute(0, 3, 1, 2).float()
        resized = functional.interpolate(first, size=(size, size), mode="bilinear")
        return (resized * scale[:, None, None] + shift[:, None, None]).contiguous()


class Network(torch.nn.Module):
    """A workload's formula as a module, its weights as buffers."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.formula, self.operations = workload.formula, TorchOperations()
        self.names = {name: "w_" + name.replace(".", "_") for name in workload.weights}
        for name, array in workload.weights.items():
            laid = array.T.copy() if name.endswith(".W") else array
            self.register_buffer(self.names[name], torch.from_numpy(laid))

    def forward(self, inputs: dict[str, Any]) -> Any:
        weights = {name: getattr(self, buffer) for name, buffer in self.names.items()}
        return self.formula(self.operations, inputs, weights)


class Torch(Engine):
    def bind(self, workload: Workload) -> Bound:
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        network = self.prepared(Network(workload).eval())
        inputs = {name: torch.from_numpy(array) for name, array in workload.inputs.items()}
        return Bound(lambda: network(inputs))

    def prepared(self, network: Any) -> Any:
        return network


class TorchCompiled(Torch):
    def prepared(self, network: Any) -> Any:
        from torch._inductor import config

        torch._dynamo.reset()  # past its limit of recompilations it would fall back to eager
        config.freezing = True
        if self.level == "v3":
            config.cpp.simdlen = 256
        return torch.compile(network, dynamic=False)
