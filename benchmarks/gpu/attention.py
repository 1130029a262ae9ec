"""Attention on the GPU beside PyTorch's scaled_dot_product_attention: a table of times and rates.

    python -m benchmarks.gpu.attention [--device cuda:0] [--calls 10] [--only TEXT]

Data are random and lie in the GPU's memory; before each timed call the L2 cache is overwritten.
Engines take turns. Results are first compared with float64, of some of the heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

from stagefuse.runtime.devices import open_plan

from ..workload import PIPES


@dataclass(frozen=True)
class Shape:
    """Queries [batch, heads, queries, size], keys and values [batch, groups, keys, size]."""

    dtype: str
    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    size: int
    causal: bool = False

    def __str__(self) -> str:
        rows = f"{self.queries}" if self.queries == self.keys else f"{self.queries} of {self.keys}"
        heads = f"{self.heads}" if self.groups == self.heads else f"{self.heads}/{self.groups}"
        causal = " causal" if self.causal else ""
        return f"{self.dtype} B{self.batch} H{heads} T{rows} D{self.size}{causal}"

    @property
    def flops(self) -> float:
        """Of both products; half of them where queries look back only."""
        whole = 4.0 * self.batch * self.heads * self.queries * self.keys * self.size
        return whole / 2 if self.causal and self.queries == self.keys else whole

    @property
    def moved(self) -> float:
        """Bytes of operands and results."""
        rows = 2 * self.heads * self.queries + 2 * self.groups * self.keys
        return float(self.batch * rows * self.size * 2)

    def source(self) -> str:
        e, d = self.dtype, self.size
        causal = ", causal=True" if self.causal else ""
        return f"""import nn

pipeline p(q: {e}[B, {self.heads}, T, {d}], k: {e}[B, {self.groups}, S, {d}],
           v: {e}[B, {self.groups}, S, {d}]) -> {e}[B, {self.heads}, T, {d}]
where B in 1..=64, T in 1..=16384, S in 1..=131072:
    nn.attend(q, k, v{causal})
"""


SHAPES = (
    Shape("bf16", 4, 16, 16, 4096, 4096, 128),
    Shape("bf16", 4, 16, 16, 4096, 4096, 128, causal=True),
    Shape("f16", 4, 16, 16, 4096, 4096, 128),
    Shape("bf16", 1, 16, 16, 16384, 16384, 128, causal=True),
    Shape("bf16", 4, 32, 32, 2048, 2048, 64),
    Shape("bf16", 4, 32, 32, 2048, 2048, 64, causal=True),
    Shape("bf16", 8, 12, 12, 512, 512, 64),
    Shape("bf16", 4, 8, 8, 4096, 4096, 256),
    Shape("bf16", 4, 32, 8, 2048, 2048, 128, causal=True),
    Shape("bf16", 1, 32, 32, 1, 8192, 128),
    Shape("bf16", 8, 32, 32, 1, 4096, 128),
    Shape("bf16", 1, 32, 8, 1, 32768, 128),
    Shape("bf16", 16, 32, 8, 1, 8192, 128),
    Shape("bf16", 1, 32, 32, 16, 8192, 128),
)


@dataclass(frozen=True)
class Row:
    """Times in seconds; the greatest error of ours, and of PyTorch's, against float64."""

    shape: Shape
    ours: float
    torch: float
    error: float
    torch_error: float

    def text(self) -> str:
        s = self.shape
        if s.queries >= 128:
            rates = [f"{s.flops / t / 1e12:.0f} TFLOP/s" for t in (self.ours, self.torch)]
        else:
            rates = [f"{s.moved / t / 1e9:.0f} GB/s" for t in (self.ours, self.torch)]
        cells = [
            str(s), f"{self.ours * 1e6:.1f}", f"{self.torch * 1e6:.1f}",
            f"{self.ours / self.torch:.2f}", *rates, f"{self.error:.1e}", f"{self.torch_error:.1e}",
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"


HEAD = """| | stagefuse, us | SDPA, us | ratio | stagefuse | SDPA | error | of SDPA |
|---|---|---|---|---|---|---|---|"""


def compiled(shape: Shape, arch: str) -> Any:
    """The plan of a shape's pipeline; its sizes but for the heads' are known by the call only."""
    from stagefuse.compiler import driver, front
    from stagefuse.dsl.source import Source

    program, found, load = front.check_text(Source("p.pipe", shape.source()), PIPES, {})
    if found:
        raise ValueError("\n".join(str(f) for f in found))
    return driver.compile_program(program, load, None, levels=(), targets=(arch,))


def reference(shape: Shape, q: Any, k: Any, v: Any) -> Any:
    """The result in float64, of one batch and two heads at most, and of 256 queries."""
    import torch

    rows = slice(max(0, shape.queries - 256), shape.queries)
    share = shape.heads // shape.groups
    found = []
    for head in (0, shape.heads - 1):
        queries = q[-1, head, rows].double()
        keys, values = (x[-1, head // share].double() for x in (k, v))
        scores = queries @ keys.T / math.sqrt(shape.size)
        if shape.causal:
            at = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            later = torch.arange(shape.keys, device=q.device)[None, :]
            scores = scores.masked_fill(later > at + shape.keys - shape.queries, -math.inf)
        found.append(torch.softmax(scores, -1) @ values)
    return torch.stack(found)


def measured(shape: Shape, plan: Any, device: str, calls: int) -> Row:
    """One shape's row. `plan`: that of its pipeline."""
    import torch

    from .measure import Gpu, in_turns

    gpu = Gpu(device)
    kind = {"bf16": torch.bfloat16, "f16": torch.float16}[shape.dtype]
    generator = torch.Generator(device).manual_seed(1)

    def random(*sizes: int) -> Any:
        return torch.randn(sizes, dtype=kind, device=device, generator=generator)

    q = random(shape.batch, shape.heads, shape.queries, shape.size)
    k, v = (random(shape.batch, shape.groups, shape.keys, shape.size) for _ in range(2))
    out = torch.empty_like(q)
    pipe = open_plan(plan, None, device)
    on = pipe.on(gpu.stream)
    grouped = {"enable_gqa": True} if shape.groups != shape.heads else {}
    attend = torch.nn.functional.scaled_dot_product_attention
    results = {}

    def ours() -> None:
        on(q=q, k=k, v=v, out=out)

    def theirs() -> None:
        results["torch"] = attend(q, k, v, is_causal=shape.causal, **grouped)

    with torch.cuda.stream(gpu.stream):
        ours()
        theirs()
    gpu.stream.synchronize()
    wanted = reference(shape, q, k, v)
    rows = slice(max(0, shape.queries - 256), shape.queries)
    errors = [
        float((x[-1][[0, shape.heads - 1]][:, rows].double() - wanted).abs().max())
        for x in (out, results["torch"])
    ]
    times = in_turns(gpu, {"ours": ours, "torch": theirs}, 3, calls)
    return Row(shape, times["ours"], times["torch"], *errors)


def table(device: str, arch: str, calls: int, only: str = "") -> Iterator[str]:
    """The lines of the table."""
    yield HEAD
    for shape in SHAPES:
        if only in str(shape):
            yield measured(shape, compiled(shape, arch), device, calls).text()


@click.command()
@click.option("--device", default="cuda:0")
@click.option("--arch", default="h200", help="The target to compile for.")
@click.option("--calls", default=10)
@click.option("--only", default="", help="Shapes with this text in their name.")
def main(device: str, arch: str, calls: int, only: str) -> None:
    """Attention beside PyTorch's."""
    for line in table(device, arch, calls, only):
        click.echo(line)


if __name__ == "__main__":
    main()
