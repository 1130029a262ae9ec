# mypy: disable-error-code="import-not-found, import-untyped"
"""Instructions of our kernels beside Triton's, without a GPU: `python -m benchmarks.sass`.

Both are assembled by the ptxas each comes with and read by nvdisasm, which Triton's package has.
What counts is the instructions of a whole kernel, without the padding behind it, for the kernels
that memory bounds, and those of the innermost loop with most work for tensor cores for others.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHES = {"sm_80": ("a100", 80), "sm_89": ("l40", 89), "sm_90a": ("h200", 90)}


@dataclass(frozen=True)
class Listing:
    """The instructions of a kernel, in order, and where labels are."""

    instructions: tuple[str, ...]
    labels: Mapping[str, int]

    @property
    def whole(self) -> int:
        """All up to the last exit or branch; the rest is padding."""
        ends = [n for n, text in enumerate(self.instructions) if re.search(r"\b(EXIT|BRA)\b", text)]
        own = self.instructions[: ends[-1] + 1]
        return sum(not text.startswith("NOP") for text in own)

    @property
    def tensor(self) -> frozenset[str]:
        """The kinds of tensor-core instructions."""
        return frozenset(x.split(".")[0].split()[-1] for x in self.instructions if "MMA" in x)

    def loop(self) -> tuple[int, int]:
        """Instructions of the loop with most multiply-adds on tensor cores, of those with no such
        loop inside, and how many of a warp or warpgroup these are."""
        best, inside = (0, 0), list[int]()
        for end, text in enumerate(self.instructions):
            match = re.search(r"BRA.*?(\.L_x_\d+)", text)
            start = self.labels.get(match[1], end + 1) if match else end + 1
            body = self.instructions[start : end + 1]
            done = sum(map(multiply_adds, body))
            if done and all(start > at for at in inside):
                inside.append(end)
                best = max(best, (done, len(body)), key=lambda b: b[0])
        return best[1], best[0]


def multiply_adds(text: str) -> int:
    """Those of one instruction, by the shape in its name: 64x128x16, or 16816 for 16 by 8 by 16."""
    match = re.search(r"MMA\.(?:SP\.)?(?:(\d+)x(\d+)x(\d+)|16(8)(\d+))\b", text)
    if not match:
        return 0
    if match[4]:
        return 16 * 8 * int(match[5])
    return int(match[1]) * int(match[2]) * int(match[3])


def disassembled(cubin: bytes, kernel: str) -> Listing:
    """What nvdisasm says of a kernel of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-c", file.name], check=True, capture_output=True, text=True
        ).stdout
    section = text.split(f".section\t.text.{kernel},", 1)[1].split(".section\t", 1)[0]
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(match[1])
    return Listing(tuple(instructions), labels)


def ours(text: str, arch: str) -> Listing:
    """The largest kernel of a pipeline."""
    from stagefuse.compiler.driver import compile_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.pipe"
        path.write_text(text)
        plan = compile_file(path, targets=[ARCHES[arch][0]])
    (gpu,) = plan.pipelines[0].gpu
    code = {name: cubin.code for cubin in plan.cubins[arch] for name in cubin.kernels}
    found = [disassembled(code[x.kernel], x.kernel) for x in gpu.launches]
    return max(found, key=lambda x: (x.loop()[1], x.whole))


def theirs(kernel: Any, types: Mapping[str, str], constants: Mapping[str, int], arch: str,
           warps: int, stages: int = 3) -> Listing:  # fmt: skip
    """A kernel of Triton, its pointers and sizes multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    places = {name: n for n, name in enumerate(kernel.arg_names)}
    divisible = {(places[n],): [["tt.divisibility", 16]] for n in types}
    source = ASTSource(
        kernel, signature, {(places[n],): v for n, v in constants.items()}, attrs=divisible
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", ARCHES[arch][1], 32),
        options={"num_warps": warps, "num_stages": stages},
    )  # fmt: skip
    return disassembled(made.asm["cubin"], made.metadata.name)


@dataclass(frozen=True)
class Pair:
    """A kernel of ours and Triton's; `bound`: by memory or by products."""

    name: str
    bound: str
    source: str
    triton: Callable[[str], Listing]


def pairs() -> list[Pair]:
    return [*_of_memory(), *_of_products()]


def _of_memory() -> list[Pair]:
    from . import sass_triton as t

    rows = {"x": "*bf16", "y": "*bf16", "n": "i32"}
    head = "import nn\n\npipeline p"
    return [
        Pair("gelu(x * s + b) + r, bf16", "memory",
             f"{head}(x: bf16[N], r: bf16[N]) -> bf16[N]\nwhere N % 2048 == 0:\n"
             "    nn.gelu_tanh(x * 1.5 + 0.5) + r\n",
             lambda a: theirs(t.gelu, {**rows, "r": "*bf16"}, {"BLOCK": 2048}, a, 8)),
        Pair("softmax, rows of 4096, bf16", "memory",
             f"{head}(x: bf16[B, 4096]) -> bf16[B, 4096]:\n    nn.softmax(x)\n",
             lambda a: theirs(t.softmax, {"x": "*bf16", "y": "*bf16"}, {"N": 4096}, a, 8)),
        Pair("softmax, rows of 1024, f32", "memory",
             f"{head}(x: f32[B, 1024]) -> f32[B, 1024]:\n    nn.softmax(x)\n",
             lambda a: theirs(t.softmax, {"x": "*fp32", "y": "*fp32"}, {"N": 1024}, a, 1)),
        Pair("RMS norm, rows of 4096, bf16", "memory",
             f"{head}(x: bf16[B, 4096], g: bf16[4096]) -> bf16[B, 4096]:\n"
             "    x * rsqrt(mean(x * x, axis=-1, keepdims=True) + 1e-6) * g\n",
             lambda a: theirs(t.rms_norm, {"x": "*bf16", "g": "*bf16", "y": "*bf16"},
                              {"N": 4096}, a, 8)),
        Pair("layer norm, rows of 1024, f32", "memory",
             f"{head}(x: f32[B, 1024], g: f32[1024], b: f32[1024]) -> f32[B, 1024]:\n"
             "    c = x - mean(x, axis=-1, keepdims=True)\n"
             "    c * rsqrt(mean(c * c, axis=-1, keepdims=True) + 1e-5) * g + b\n",
             lambda a: theirs(t.layer_norm, {"x": "*fp32", "g": "*fp32", "b": "*fp32",
                                             "y": "*fp32"}, {"N": 1024}, a, 1)),
        Pair("masked softmax, rows of 4096, bf16", "memory",
             f"{head}(x: bf16[B, 4096], m: u8[4096]) -> bf16[B, 4096]:\n"
             "    nn.masked_softmax(x, (m != 0)[None])\n",
             lambda a: theirs(t.masked_softmax, {"x": "*bf16", "m": "*u8", "y": "*bf16"},
                              {"N": 4096}, a, 8)),
        Pair("cross entropy, rows of 32000, bf16", "memory",
             f"{head}(x: bf16[B, 32000], label: i64[B]) -> f32[B]:\n"
             "    p = nn.log_softmax(f32(x))\n    found[b] = p[b, label[b]]\n    -found\n",
             lambda a: theirs(t.cross_entropy, {"x": "*bf16", "label": "*i64", "y": "*fp32"},
                              {"N": 32000, "BLOCK": 32768}, a, 16)),
        Pair("silu(a) * b, rows of 4096, bf16", "memory",
             f"{head}(x: bf16[B, 8192]) -> bf16[B, 4096]:\n"
             "    a, b = split(x, 2, axis=1)\n    nn.silu(a) * b\n",
             lambda a: theirs(t.swiglu, {"x": "*bf16", "y": "*bf16"}, {"N": 4096}, a, 8)),
        Pair("to i8 and scales, rows of 4096, bf16", "memory",
             f"{head}(x: bf16[B, 4096]) -> (i8[B, 4096], f32[B, 1]):\n    y = f32(x)\n"
             "    s = max(abs(y), axis=-1, keepdims=True) / 127.0 + 1e-6\n"
             "    i8(round(y / s)), s\n",
             lambda a: theirs(t.quantise, {"x": "*bf16", "q": "*i8", "s": "*fp32"},
                              {"N": 4096}, a, 8)),
        Pair("i8 by scales, rows of 4096, bf16", "memory",
             f"{head}(q: i8[B, 4096], s: f32[B]) -> bf16[B, 4096]:\n"
             "    bf16(f32(q) * s[:, None])\n",
             lambda a: theirs(t.dequantise, {"q": "*i8", "s": "*fp32", "y": "*bf16"},
                              {"N": 4096}, a, 8)),
    ]  # fmt: skip


def _of_products() -> list[Pair]:
    from . import sass_triton as t

    head = "pipeline p"
    return [
        Pair("product, bf16, 4096 deep", "products",
             f"{head}(a: bf16[M, 4096], b: bf16[4096, 4096]) -> bf16[M, 4096]:\n    a @ b\n",
             lambda a: theirs(t.matmul, {"a": "*bf16", "b": "*bf16", "c": "*bf16", "m": "i32"},
                              {"N": 4096, "K": 4096, "BM": 128, "BN": 128, "BK": 32}, a, 4)),
        Pair("attention, bf16, heads of 128", "products",
             f"import nn\n\n{head}(q: bf16[B, 8, T, 128], k: bf16[B, 8, S, 128],"
             " v: bf16[B, 8, S, 128]) -> bf16[B, 8, T, 128]:\n    nn.attend(q, k, v)\n",
             lambda a: theirs(t.attend, {"q": "*bf16", "k": "*bf16", "v": "*bf16", "o": "*bf16",
                                         "rows": "i32", "keys": "i32"},
                              {"D": 128, "BM": 64, "BN": 64}, a, 4, 2)),
    ]  # fmt: skip


def table() -> str:
    """The table, as Markdown."""
    import triton

    lines = [
        f"Instructions of our kernels and of Triton {triton.__version__}'s, by nvdisasm: all of a",
        "kernel, or those of the innermost loop around its tensor-core instructions, and how many",
        "thousands of multiply-adds of a warp or warpgroup those are, by which the ratio is taken.",
        "Loops of attention have code for blocks that a mask cuts, which others jump over: 280 of",
        "ours on sm_90a. A lane has as many elements in both. Ours divide and take roots, powers",
        "of f32 to 1 or 2 units in the last place, exponentials of 16 bits to 2^-16. In cross",
        "entropy Triton fills a row up to a power of two.",
        "",
        "| kernel | arch | ours | Triton | ours / Triton |",
        "|---|---|---|---|---|",
    ]
    for pair in pairs():
        for arch in ARCHES:
            own, other = ours(pair.source, arch), pair.triton(arch)
            texts, ratio = [str(own.whole), str(other.whole)], own.whole / other.whole
            if pair.bound == "products":
                (a, mine), (b, its) = own.loop(), other.loop()
                texts = [f"loop {a}, {mine >> 10} K", f"loop {b}, {its >> 10} K"]
                ratio = (a / mine) / (b / its) if own.tensor == other.tensor else 0.0
            shown = f"{ratio:.2f}" if ratio else "other instructions"
            lines.append(f"| {pair.name} | {arch} | {texts[0]} | {texts[1]} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())
