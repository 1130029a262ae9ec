"""ONNX Runtime and OpenVINO, both from a workload's formula as an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .engines import Bound, Engine
from .operations import Operations
from .workload import Array, Workload

OPSET = 20
CONTRIB = "com.microsoft"


class Value:
    """A value of the graph under construction."""

    def __init__(self, graph: Graph, name: str, shape: Sequence[int], dtype: Any) -> None:
        self.graph, self.name, self.shape, self.dtype = graph, name, tuple(shape), np.dtype(dtype)

    def __add__(self, other: Any) -> Value:
        return self.graph.pointwise("Add", self, other)

    def __mul__(self, other: Any) -> Value:
        return self.graph.pointwise("Mul", self, other)


class Graph(Operations):
    """Operations that append nodes. `contrib`: with ONNX Runtime's own attention and rms norm."""

    def __init__(self, workload: Workload, contrib: bool) -> None:
        super().__init__()
        self.nodes: list[Any] = []
        self.constants: dict[int, tuple[str, Array, Any]] = {}
        self.contrib, self.name = contrib, workload.family.name
        self.inputs = {k: Value(self, k, a.shape, a.dtype) for k, a in workload.inputs.items()}
        self.results = workload.formula(self, self.inputs, workload.weights)

    def model(self) -> bytes:
        """The serialized model."""
        from onnx import helper, numpy_helper

        def described(value: Value) -> Any:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            return helper.make_tensor_value_info(value.name, kind, value.shape)

        initializers = [numpy_helper.from_array(a, n) for n, a, _ in self.constants.values()]
        graph = helper.make_graph(
            self.nodes, self.name, [described(v) for v in self.inputs.values()],
            [described(v) for v in self.results], initializers,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET)]
        if self.contrib:
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        serialized: bytes = model.SerializeToString()
        return serialized

    def argument(self, value: Any) -> str:
        """The name of an operand; a NumPy array or a number becomes a constant, once each."""
        if value is None:
            return ""
        if isinstance(value, Value):
            return value.name
        if id(value) not in self.constants:
            array = np.asarray(value, None if isinstance(value, np.ndarray) else np.float32)
            # the value is kept too, so that its id stays its own
            self.constants[id(value)] = (f"c{len(self.constants)}", array, value)
        return self.constants[id(value)][0]

    def append(
        self, kind: str, operands: Sequence[Any], shape: Sequence[int], count: int = 1,
        domain: str = "", **attributes: Any,
    ) -> list[Value]:  # fmt: skip
        from onnx import helper

        names = [f"v{len(self.nodes)}_{i}" for i in range(count)]
        inputs = [self.argument(x) for x in operands]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return [Value(self, name, shape, np.float32) for name in names]

    def one(self, kind: str, operands: Sequence[Any], shape: Sequence[int], **more: Any) -> Value:
        return self.append(kind, operands, shape, **more)[0]

    def pointwise(self, kind: str, *operands: Any, **attributes: Any) -> Value:
        shape = np.broadcast_shapes(*(getattr(x, "shape", ()) for x in operands))
        return self.one(kind, operands, shape, **attributes)

    def gelu(self, x: Any) -> Any:
        return self.pointwise("Gelu", x)

    def relu(self, x: Any) -> Any:
        return self.pointwise("Relu", x)

    def silu(self, x: Any) -> Any:
        return x * self.pointwise("Sigmoid", x)

    def softmax(self, x: Any) -> Any:
        return self.one("Softmax", [x], x.shape, axis=-1)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Any:
        operands = [x, weight, bias]
        return self.one("LayerNormalization", operands, x.shape, axis=-1, epsilon=eps)

    def rms_norm(self, x: Any, weight: Any, eps: float = 1e-5) -> Any:
        if self.contrib:
            kind = "SimplifiedLayerNormalization"
            return self.one(kind, [x, weight], x.shape, axis=-1, epsilon=eps)
        mean = self.one("ReduceMean", [x * x, np.array([-1])], (*x.shape[:-1], 1))
        return self.pointwise("Div", x, self.pointwise("Sqrt", mean + eps)) * weight

    def matmul(self, a: Any, b: Any) -> Any:
        return self.one("MatMul", [a, b], (*a.shape[:-1], b.shape[-1]))

    def embed(self, table: Any, ids: Any) -> Any:
        return self.one("Gather", [table, ids], (*ids.shape, table.shape[1]))

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        return self.one("Reshape", [x, np.array(shape)], shape)

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        return self.one("Transpose", [x], [x.shape[axis] for axis in axes], perm=axes)

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.one("Concat", parts, shape, axis=axis)

    def split(self, x: Any, count: int) -> Any:
        shape = (*x.shape[:-1], x.shape[-1] // count)
        return self.append("Split", [x], shape, count, axis=-1, num_outputs=count)

    def attention(self, q: Any, k: Any, v: Any, heads: int, bias: Any = None) -> Any:
        if not self.contrib:
            return super().attention(q, k, v, heads, bias)
        if bias is not None:
            shape = (bias.shape[0], 1, q.shape[1], k.shape[1])
            bias = self.one("Expand", [bias, np.array(shape)], shape)
        operands = [q, k, v, None, None, bias]
        kind = "MultiHeadAttention"
        return self.one(kind, operands, q.shape, domain=CONTRIB, num_heads=heads)

    def conv(self, x: Any, kernel: Any, bias: Any, stride: int, padding: int) -> Any:
        size = [(s + 2 * padding - kernel.shape[2]) // stride + 1 for s in x.shape[2:]]
        shape = (x.shape[0], len(kernel), *size)
        operands = [x, kernel, bias]
        return self.one("Conv", operands, shape, strides=[stride] * 2, pads=[padding] * 4)

    def max_pool(self, x: Any) -> Any:
        shape = (*x.shape[:2], *((size + 1) // 2 for size in x.shape[2:]))
        options = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
        return self.one("MaxPool", [x], shape, **options)

    def mean_of_image(self, x: Any) -> Any:
        pooled = self.one("GlobalAveragePool", [x], (*x.shape[:2], 1, 1))
        return self.reshape(pooled, x.shape[:2])

    def preprocess(self, image: Any, size: int, scale: Any, shift: Any) -> Any:
        shape = (image.shape[0], size, size, image.shape[3])
        floats = self.one("Cast", [image], image.shape, to=1)
        operands = [floats, None, None, np.array(shape)]
        resized = self.one("Resize", operands, shape, mode="linear")
        return self.transpose(resized * scale + shift, (0, 3, 1, 2))


class OnnxRuntime(Engine):
    def bind(self, workload: Workload) -> Bound:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        model = Graph(workload, contrib=True).model()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = workload.inputs
        return Bound(lambda: session.run(None, inputs))


class OpenVino(Engine):
    def bind(self, workload: Workload) -> Bound:
        import openvino

        model = openvino.Core().read_model(Graph(workload, contrib=False).model())
        options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # or it would take bfloat16 where the CPU has it
        }
        request = openvino.compile_model(model, "CPU", options).create_infer_request()
        inputs = workload.inputs

        def run() -> list[Any]:
            return list(request.infer(inputs, share_inputs=True, share_outputs=True).values())

        return Bound(run)
