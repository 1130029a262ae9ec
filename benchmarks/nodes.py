"""Single convolutions and poolings, stagefuse's CPU code beside peers on the same ONNX node.

Each node runs alone, on random data. A name says what it is: `conv 3x3 /2 64x56x56 - 128` is a
3 x 3 convolution with a stride of 2 from 64 channels of 56 x 56 places to 128.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import table
from .engines import Bound
from .harness import Row, Settings, loaded, processes, take_rounds
from .workload import PIPES

TOLERANCE = 1e-4
"""Of the largest element: far above rounding, far below a wrong result."""


@dataclass(frozen=True)
class Node:
    """A convolution or pooling of an image [B, C, ...]; padded evenly to keep its size, or not."""

    kind: str
    image: tuple[int, ...]
    kernel: tuple[int, ...]
    channels: int = 0
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padded: bool = True

    def __str__(self) -> str:
        def by(sizes: tuple[int, ...]) -> str:
            return "x".join(map(str, sizes))

        more = [f"/{self.stride}"] * (self.stride > 1) + [f"dil{self.dilation}"] * (
            self.dilation > 1
        )
        more += [f"g{self.groups}"] * (self.groups > 1)
        more += ["bare"] * (not self.padded)
        batch = "" if self.image[0] == 1 else f"{self.image[0]}:"
        out = [f"- {self.channels}"] if self.channels else []
        return " ".join([self.kind, by(self.kernel), *more, batch + by(self.image[1:]), *out])

    @property
    def pads(self) -> list[int]:
        around = [(k - 1) * self.dilation // 2 if self.padded else 0 for k in self.kernel]
        return around * 2

    def model(self) -> bytes:
        """As an ONNX model of this node alone."""
        from onnx import TensorProto, helper, numpy_helper

        rng, rank = np.random.default_rng(0), len(self.image)
        attributes: dict[str, Any] = {"kernel_shape": self.kernel, "pads": self.pads,
                                      "strides": [self.stride] * len(self.kernel)}  # fmt: skip
        weights = []
        if self.kind in ("conv", "transposed"):
            inputs, outputs = self.image[1] // self.groups, self.channels
            if self.kind == "transposed":
                inputs, outputs = self.image[1], self.channels // self.groups
            shape = (inputs, outputs) if self.kind == "transposed" else (outputs, inputs)
            kernel = rng.standard_normal((*shape, *self.kernel), np.float32)
            kernel /= np.float32(math.sqrt(inputs * math.prod(self.kernel)))
            bias = rng.standard_normal(self.channels, np.float32)
            weights = [numpy_helper.from_array(kernel, "k"), numpy_helper.from_array(bias, "b")]
            attributes |= {"group": self.groups, "dilations": [self.dilation] * len(self.kernel)}
        elif self.kind == "norm":
            scale = rng.standard_normal((2, self.image[1]), np.float32)
            weights = [numpy_helper.from_array(scale[0], "k"),
                       numpy_helper.from_array(scale[1], "b")]  # fmt: skip
            attributes = {}
        op = {"conv": "Conv", "transposed": "ConvTranspose", "max": "MaxPool",
              "mean": "AveragePool", "norm": "InstanceNormalization"}[self.kind]  # fmt: skip
        names = ["x", *(w.name for w in weights)]
        node = helper.make_node(op, names, ["y"], **attributes)
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.image)
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
        graph = helper.make_graph([node], "node", [given], [result], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        return bytes(model.SerializeToString())


def conv(image: str, kernel: str, channels: int, **more: Any) -> Node:
    return Node("conv", sizes(image), sizes(kernel), channels, **more)


def depthwise(image: str, kernel: str, **more: Any) -> Node:
    channels = sizes(image)[1]
    return Node("conv", sizes(image), sizes(kernel), channels, groups=channels, **more)


def sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def nodes() -> list[Node]:
    """Those of known networks, and other sizes of the same kinds."""
    plain = [
        conv("1x3x224x224", "7x7", 64, stride=2), conv("1x3x224x224", "3x3", 32, stride=2),
        conv("1x64x56x56", "3x3", 64), conv("1x128x28x28", "3x3", 128),
        conv("1x256x14x14", "3x3", 256), conv("1x512x7x7", "3x3", 512),
        conv("1x64x56x56", "3x3", 128, stride=2), conv("1x128x28x28", "3x3", 256, stride=2),
        conv("1x256x14x14", "3x3", 512, stride=2), conv("1x64x80x80", "3x3", 64),
        conv("1x32x160x160", "3x3", 64, stride=2), conv("1x64x56x56", "3x3", 64, dilation=2),
        conv("16x32x8x8", "3x3", 64), conv("8x64x28x28", "3x3", 64), conv("64x16x5x5", "3x3", 32),
        conv("1x64x56x56", "1x1", 256), conv("1x256x56x56", "1x1", 64),
        conv("1x256x56x56", "1x1", 512, stride=2), conv("1x1024x14x14", "1x1", 256),
        conv("1x512x7x7", "1x1", 2048), conv("1x2048x7x7", "1x1", 512),
        conv("1x16x112x112", "1x1", 96), conv("1x144x56x56", "1x1", 24),
        conv("1x320x7x7", "1x1", 1280), conv("1x64x56x56", "1x1", 128, stride=2),
        conv("1x64x17x17", "1x7", 64), conv("1x64x17x17", "7x1", 64),
        conv("1x160x17x17", "1x7", 192), conv("1x160x17x17", "7x1", 192),
        conv("1x5x37x41", "3x3", 7), conv("1x3x64x64", "5x5", 5), conv("1x7x31x29", "3x3", 13),
        conv("1x3x224x224", "16x16", 768, stride=16, padded=False),
        conv("1x3x224x224", "4x4", 96, stride=4, padded=False),
        conv("1x96x56x56", "2x2", 192, stride=2, padded=False),
        conv("1x64x224x224", "3x3", 3), conv("1x64x56x56", "3x3", 1),
        conv("1x16x16x28x28", "3x3x3", 32), conv("1x3x8x56x56", "3x7x7", 32, stride=2),
    ]
    grouped = [
        conv("1x128x56x56", "3x3", 128, groups=32), conv("1x256x14x14", "3x3", 256, groups=32),
        conv("1x96x28x28", "3x3", 96, groups=2), conv("1x240x28x28", "1x1", 60, groups=3),
        depthwise("1x32x112x112", "3x3"), depthwise("1x144x56x56", "3x3", stride=2),
        depthwise("1x576x14x14", "5x5"), depthwise("1x960x7x7", "3x3"),
        depthwise("1x960x7x7", "5x5"), depthwise("1x192x28x28", "7x7"),
        depthwise("1x768x7x7", "7x7"), depthwise("8x384x14x14", "7x7"),
        depthwise("1x96x56x56", "7x7"), depthwise("8x96x28x28", "3x3"),
        depthwise("1x32x28x28", "31x31"), depthwise("1x64x56x56", "3x3", dilation=2),
    ]
    along = [
        conv("1x80x3000", "3", 384), conv("1x384x3000", "3", 384, stride=2),
        conv("1x1x16000", "400", 64, stride=160, padded=False), conv("1x1x44100", "31", 16),
        conv("1x512x100", "3", 512), conv("4x32x8000", "8", 32, stride=4, padded=False),
        conv("1x32x4000", "7", 32, dilation=3), conv("1x16x20000", "5", 16),
        depthwise("1x256x1000", "31"), depthwise("1x512x100", "3"),
    ]
    others = [
        Node("transposed", (1, 64, 28, 28), (2, 2), 32, 2, padded=False),
        Node("transposed", (1, 128, 16, 16), (4, 4), 64, 2),
        Node("transposed", (1, 64, 56, 56), (3, 3), 32, 2),
        Node("transposed", (1, 256, 500), (16,), 128, 8),
        Node("max", (1, 64, 112, 112), (3, 3), stride=2),
        Node("max", (1, 64, 112, 112), (2, 2), stride=2, padded=False),
        Node("max", (1, 256, 20, 20), (5, 5)), Node("max", (1, 64, 40, 40), (9, 9)),
        Node("max", (1, 128, 13, 13), (13, 13)), Node("max", (1, 192, 35, 35), (3, 3)),
        Node("max", (1, 64, 4000), (4,), stride=4, padded=False),
        Node("mean", (1, 64, 28, 28), (3, 3)), Node("mean", (1, 192, 35, 35), (3, 3)),
        Node("mean", (1, 64, 56, 56), (2, 2), stride=2, padded=False),
        Node("mean", (1, 64, 31, 33), (5, 5), stride=2),
        Node("norm", (1, 64, 56, 56), ()), Node("norm", (1, 128, 16, 16), ()),
        Node("norm", (1, 32, 128, 128), ()), Node("norm", (4, 64, 500), ()),
    ]  # fmt: skip
    return [*plain, *grouped, *along, *others]


def bound(engine: str, name: str, threads: int, level: str) -> Bound:
    """A node in one of the engines. Raises ValueError where ours is not as ONNX Runtime's."""
    node = next(n for n in nodes() if str(n) == name)
    x = np.random.default_rng(1).standard_normal(node.image, np.float32)
    if engine == "stagefuse":
        return _ours(node, x, threads, level)
    if engine == "openvino":
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
                   "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
        core = openvino.Core()
        request = core.compile_model(core.read_model(node.model()), "CPU", options)
        call = request.create_infer_request()
        return Bound(lambda: call.infer([x], share_inputs=True, share_outputs=True))
    return Bound(_runtime(node, x, threads))


def _runtime(node: Node, x: np.ndarray[Any, Any], threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        node.model(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": x})


def _ours(node: Node, x: np.ndarray[Any, Any], threads: int, level: str) -> Bound:
    import onnx

    from stagefuse.compiler import driver, front
    from stagefuse.dsl.source import Source
    from stagefuse.onnx import import_model
    from stagefuse.runtime.cpu_pipeline import CpuPipeline

    imported = import_model(onnx.load_from_string(node.model()))
    given = {"w": imported.arrays} if imported.arrays else {}
    source = Source("node.pipe", imported.text)
    program, found, load = front.check_text(source, PIPES, given)
    if found:
        raise ValueError("\n".join(map(str, found)))
    plan = driver.compile_program(program, load, None, levels=(level[:2],))
    pipe = CpuPipeline(plan, threads=threads, tiles=level.endswith("amx"))
    (argument,) = imported.inputs.values()
    ours, wanted = pipe(**{argument: x}), _runtime(node, x, 1)()[0]
    if np.abs(ours - wanted).max() > TOLERANCE * np.abs(wanted).max():
        raise ValueError(f"wrong: off by {np.abs(ours - wanted).max():.1e}")
    return Bound(lambda: pipe(**{argument: x}))


LEVELS = {"avx2": "v3", "avx512": "v4", "amx": "v4-amx"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.nodes", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names, with * and ?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.03, help="of one batch")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--isa", choices=LEVELS, default="avx512")
    parser.add_argument("--engines", default="onnxruntime,openvino")
    options = parser.parse_args()
    engines = ("stagefuse", *options.engines.split(","))
    settings = Settings(engines, options.threads, LEVELS[options.isa], options.rounds,
                        options.seconds, 3, 0, clock=options.clock)  # fmt: skip
    print("\n".join([*table.heading(settings), "", *table.header(engines)]))
    with processes(settings) as running:
        for node in nodes():
            if not fnmatch.fnmatch(str(node), options.only):
                continue
            row = Row(str(node), "", {}, {})
            for process in running:
                row.engines[process.engine] = loaded(process.ask("open", "nodes", str(node)))
            take_rounds(row, running, settings)
            print(table.line(row, engines), flush=True)
            for failure in table.failures(row):
                print(failure, file=sys.stderr)


if __name__ == "__main__":
    main()
