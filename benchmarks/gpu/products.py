"""Products of matrices: beside cuBLAS, as `torch.matmul`, `torch._scaled_mm` and `torch._int_mm`.

16 bits and f32 have results of their own type, f8 gives bf16 and i8 i32. f32 is as exact as f32 in
both. Sizes are constants unless the name has a letter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .cases import TORCH, Case, Integers, Normal

RESULT = {"f8e4m3": "bf16", "i8": "i32"}
TOLERANCE = {"bf16": 2**-7, "f16": 2**-10, "f32": 1e-5, "f8e4m3": 2**-6, "i8": 0.0}
"""Of the largest element: two units of a result rounded to 16 bits; f8 also keeps some 13 bits of
sums."""


@dataclass(frozen=True)
class Product:
    """`count` products of [m, k] by [k, n]. Transposed operands are [k, m], if `left`, and [n, k],
    if `right`. `free` sizes are known by the call only."""

    kind: str
    m: int
    n: int
    k: int
    right: bool = False
    left: bool = False
    count: int = 1
    free: str = ""

    @property
    def name(self) -> str:
        several = f"{self.count} of " if self.count > 1 else ""
        turned = [w for w, is_so in (("left", self.left), ("right", self.right)) if is_so]
        said = f", {' and '.join(turned)} transposed" if turned else ""
        free = f", {' '.join(self.free)} unknown" if self.free else ""
        return f"{self.kind} {several}{self.m} x {self.n} x {self.k}{said}{free}"

    @property
    def flops(self) -> float:
        return 2.0 * self.count * self.m * self.n * self.k

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        several = (self.count,) if self.count > 1 else ()
        left = (self.k, self.m) if self.left else (self.m, self.k)
        right = (self.n, self.k) if self.right else (self.k, self.n)
        return (*several, *left), (*several, *right)

    def source(self, more: str = "", after: str = "{y}", norm: bool = False) -> str:
        """`more`: further inputs; `after`: the result, of the product `{y}`; `norm`: the left
        operand's rows are normed before."""
        names = {self.m: "M", self.n: "N", self.k: "K"}
        free = {size: letter for size, letter in names.items() if letter in self.free}
        x, w = (", ".join(str(free.get(s, s)) for s in shape) for shape in self.shapes())
        several = [str(self.count)] if self.count > 1 else []
        y = ", ".join([*several, *(str(free.get(s, s)) for s in (self.m, self.n))])
        last = "[0, 2, 1]" if self.count > 1 else "[1, 0]"
        wide = {"f8e4m3": "f32", "i8": "i32"}.get(self.kind)
        operands = []
        for operand, is_turned in (("x", self.left), ("w", self.right)):
            turned = f"transpose({operand}, {last})" if is_turned else operand
            operands.append(f"{wide}({turned})" if wide else turned)
        if norm:
            size = "rsqrt(mean(f32(x) * f32(x), axis=1, keepdims=True) + 1e-5)"
            operands[0] = f"bf16(f32(x) * {size} * f32(g))"
        product = " @ ".join(operands)
        product = f"bf16({product})" if self.kind == "f8e4m3" else product
        result = RESULT.get(self.kind, self.kind)
        results = f"({result}[{y}], {result}[{y}])" if "{y}," in after else f"{result}[{y}]"
        return (
            f"import nn\npipeline p(x: {self.kind}[{x}], w: {self.kind}[{w}]{more}) -> {results}:\n"
            f"    y = {product}\n    {after.format(y='y')}\n"
        )

    def inputs(self) -> dict[str, Any]:
        kind = TORCH[self.kind]
        x, w = self.shapes()
        if self.kind == "i8":
            return {"x": Integers(128, x, kind, -128), "w": Integers(128, w, kind, -128)}
        return {"x": Normal(x, kind), "w": Normal(w, kind)}

    def case(self, torch: Any) -> Case:
        return Case(
            self.name, self.source(), self.inputs(), partial(_peer, torch, self),
            partial(_exact, torch, self), tolerance=TOLERANCE[self.kind], flops=self.flops,
        )  # fmt: skip


def _peer(torch: Any, product: Product, x: Any, w: Any) -> Any:
    x, w = _turned(product, x, w)
    if product.kind == "i8":
        return torch._int_mm(x, w)
    if product.kind == "f8e4m3":
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(x, w, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return torch.matmul(x, w)


def _exact(torch: Any, product: Product, x: Any, w: Any) -> Any:
    x, w = _turned(product, x, w)
    return torch.matmul(x.double(), w.double())


def _turned(product: Product, x: Any, w: Any) -> tuple[Any, Any]:
    return x.mT if product.left else x, w.mT if product.right else w


SQUARE = [
    *(Product("bf16", size, size, size, right) for size in (1024, 2048, 4096, 8192)
      for right in (False, True)),
    Product("f16", 4096, 4096, 4096),
    *(Product("f8e4m3", size, size, size, True) for size in (1024, 2048, 4096, 8192)),
    *(Product("i8", size, size, size, True) for size in (1024, 2048, 4096, 8192)),
    *(Product("f32", size, size, size) for size in (1024, 2048, 4096)),
]  # fmt: skip
OTHER = [
    Product("bf16", 4000, 4104, 1000), Product("bf16", 4000, 4104, 1000, True),
    Product("bf16", 512, 4096, 4096), Product("bf16", 4096, 512, 2048, True),
    Product("bf16", 8192, 4096, 1024), Product("bf16", 1001, 1003, 1007),
    Product("bf16", 4095, 4097, 4099), Product("f16", 1000, 1000, 999, True),
    Product("bf16", 128, 1024, 8192, True), Product("bf16", 256, 256, 16_384, True),
    Product("bf16", 512, 1024, 4096, True), Product("f8e4m3", 128, 1024, 8192, True),
    Product("i8", 128, 1024, 8192, True), Product("f32", 128, 1024, 8192),
    Product("f16", 4096, 1024, 1024, left=True), Product("f32", 4096, 1024, 1024, left=True),
    Product("bf16", 1024, 1024, 4096, left=True, free="K"),
    Product("bf16", 384, 384, 16_384, free="K"), Product("bf16", 512, 1024, 4096, True, free="MNK"),
]  # fmt: skip
THIN = [
    *(Product("bf16", m, 14_336, 4096, True) for m in (1, 8, 16, 32, 48, 64, 128, 256)),
    Product("bf16", 1, 14_336, 4096), Product("bf16", 16, 14_336, 4096),
    Product("bf16", 16, 4096, 14_336, True), Product("bf16", 64, 4096, 14_336),
    Product("bf16", 1, 4096, 4096, True), Product("bf16", 1, 4096, 4096),
    Product("f8e4m3", 16, 4096, 4096, True), Product("f8e4m3", 64, 14_336, 4096, True),
    Product("i8", 32, 4096, 4096, True), Product("f32", 1, 4096, 4096, True),
    Product("f32", 1, 4096, 4096), Product("f32", 4, 4096, 4096),
    Product("f32", 16, 4096, 4096, True),
]  # fmt: skip
BATCHES = [
    Product("bf16", 128, 128, 64, True, count=768), Product("bf16", 128, 64, 128, count=768),
    Product("bf16", 1024, 1024, 1024, count=16), Product("f32", 128, 128, 64, True, count=768),
    Product("f16", 64, 128, 8192, count=8), Product("f32", 64, 128, 8192, count=8),
]  # fmt: skip


def _cases(products: list[Product], torch: Any) -> Iterator[Case]:
    for product in products:
        yield product.case(torch)


def epilogues(torch: Any) -> Iterator[Case]:
    """What follows a product of bf16, or comes before it, in its kernel."""
    functional, p = torch.nn.functional, Product("bf16", 4096, 4096, 4096)
    bias, other = {"b": Normal((p.n,), "bfloat16")}, {"b": Normal((p.m, p.n), "bfloat16")}

    def made(name: str, source: str, more: Mapping[str, Any], peer: Any) -> Case:
        def exact(**inputs: Any) -> Any:
            return peer(**{n: t.double() for n, t in inputs.items()})

        return Case(f"bf16 {p.m} x {p.n} x {p.k}, {name}", source, {**p.inputs(), **more}, peer,
                    exact, tolerance=2**-6, flops=p.flops)  # fmt: skip

    yield made(
        "bias and gelu", p.source(f", b: bf16[{p.n}]", "nn.gelu_tanh({y} + b)"), bias,
        lambda x, w, b: functional.gelu(x @ w + b, approximate="tanh"),
    )  # fmt: skip
    yield made("residual", p.source(f", b: bf16[{p.m}, {p.n}]", "{y} + b"), other,
               lambda x, w, b: x @ w + b)  # fmt: skip
    yield made("and relu of it", p.source("", "({y}, nn.relu({y}))"), {},
               lambda x, w: (x @ w, functional.relu(x @ w)))  # fmt: skip
    yield made(
        "RMS norm before", p.source(f", g: bf16[{p.k}]", norm=True),
        {"g": Normal((p.k,), "bfloat16")},
        lambda x, w, g: functional.rms_norm(x, (p.k,), g, 1e-5) @ w,
    )  # fmt: skip


def codes(torch: Any) -> Iterator[Case]:
    """Rows by weights kept as codes, along the depth, beside cuBLAS by the matrix in their type: of
    4 bits with an f16 for 32 of them, of 8 bits with an f32 for a column."""
    rng = np.random.default_rng()
    n, k, group = 4096, 4096, 32
    few = rng.integers(-7, 8, (n, k)).astype(np.int8)
    eight = rng.integers(-127, 128, (n, k)).astype(np.int8)
    groups = rng.uniform(0.5, 1, (n, k // group)).astype(np.float16)
    scale = rng.uniform(0.5, 1, n).astype(np.float32)
    forms = {
        "4 bits": (
            f"reshape(f16(reshape(w.q, [{n}, {k // group}, {group}])) * w.s[:, :, None], "
            f"[{n}, {k}])",
            {"q": few, "s": groups}, few * np.repeat(groups, group, axis=1).astype(np.float32),
        ),
        "8 bits": ("f32(w.q) * w.s[:, None]", {"q": eight, "s": scale}, eight * scale[:, None]),
    }  # fmt: skip
    for bits, (made, weights, matrix) in forms.items():
        for kind, rows in (("bf16", (1, 2, 4, 16, 32, 64, 256, 4096)), ("f32", (1, 16))):
            right = torch.from_numpy(matrix).cuda().to(getattr(torch, TORCH[kind]))
            for m in rows:
                yield Case(
                    f"{kind} {m} x {n} x {k}, {bits}",
                    f"weights w = 'w.npz'\npipeline p(x: {kind}[M, {k}]) -> {kind}[M, {n}]\n"
                    f"where M in 1..=8192:\n    m = {made}\n    x @ transpose({kind}(m))\n",
                    {"x": Normal((m, k), TORCH[kind])}, partial(_by, right),
                    partial(_by, right.double()), weights=weights, tolerance=TOLERANCE[kind],
                    flops=2.0 * m * n * k,
                )  # fmt: skip


def _by(right: Any, x: Any) -> Any:
    return x.to(right.dtype) @ right.T


FAMILIES = {
    "square": partial(_cases, SQUARE), "products": partial(_cases, OTHER),
    "thin": partial(_cases, THIN), "batches": partial(_cases, BATCHES),
    "epilogues": epilogues, "codes": codes,
}  # fmt: skip
