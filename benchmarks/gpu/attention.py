"""Attention beside PyTorch's scaled_dot_product_attention, and of queries over keys and values kept
as codes beside it over numbers in 16 bits.

Sizes but for the heads' are known by the call only. Results are compared with f64, of some heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from .cases import TORCH, Case, Integers, Normal

TOLERANCE = {"bf16": 2**-6, "f16": 2**-9}
"""Of the largest element: weights and the result are rounded to 16 bits."""


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
    stored: str = ""  # the type of codes that keys and values are kept as

    def __str__(self) -> str:
        rows = f"{self.queries}" if self.queries == self.keys else f"{self.queries} of {self.keys}"
        heads = f"{self.heads}" if self.groups == self.heads else f"{self.heads}/{self.groups}"
        more = (" causal" if self.causal else "") + (f" by {self.stored}" if self.stored else "")
        return f"{self.dtype} B{self.batch} H{heads} T{rows} D{self.size}{more}"

    @property
    def flops(self) -> float:
        """Of both products; half of them where queries look back only."""
        whole = 4.0 * self.batch * self.heads * self.queries * self.keys * self.size
        return whole / 2 if self.causal and self.queries == self.keys else whole

    def source(self) -> str:
        e, d, stored = self.dtype, self.size, self.stored or self.dtype
        cache = f"[B, {self.groups}, S"
        scales = f", ks: {e}{cache}], vs: {e}{cache}]" if self.stored == "i8" else ""
        times = {"k": " * ks[..., None]", "v": " * vs[..., None]"} if scales else {}
        decoded = [f"{e}({x}){times.get(x, '')}" if self.stored else x for x in "kv"]
        return f"""import nn

pipeline p(q: {e}[B, {self.heads}, T, {d}],
           k: {stored}{cache}, {d}], v: {stored}{cache}, {d}]{scales})
    -> {e}[B, {self.heads}, T, {d}]
where B in 1..=64, T in 1..=16384, S in 1..=131072:
    nn.attend(q, {", ".join(decoded)}{", causal=True" if self.causal else ""})
"""

    def inputs(self) -> dict[str, Any]:
        cache = (self.batch, self.groups, self.keys)
        given: dict[str, Any] = {
            "q": Normal((self.batch, self.heads, self.queries, self.size), TORCH[self.dtype])
        }
        for name in "kv":
            if self.stored == "i8":
                given[name] = Integers(128, (*cache, self.size), "int8", -128)
                given[f"{name}s"] = Normal(cache, TORCH[self.dtype])
            else:
                given[name] = Normal((*cache, self.size), TORCH[self.stored or self.dtype])
        return given

    def case(self, torch: Any) -> Case:
        grouped = {"enable_gqa": True} if self.groups != self.heads else {}
        attend = torch.nn.functional.scaled_dot_product_attention
        return Case(
            str(self), self.source(), self.inputs(),
            partial(_attended, attend, is_causal=self.causal, **grouped),
            partial(_exact, torch, self), partial(_part, self), partial(_decoded, torch, self),
            tolerance=TOLERANCE[self.dtype], flops=self.flops if self.queries > 1 else 0.0,
        )  # fmt: skip


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
    Shape("bf16", 1, 32, 8, 1, 256, 128),
    Shape("bf16", 1, 32, 8, 1, 1024, 128),
    Shape("bf16", 1, 32, 32, 1, 8192, 128),
    Shape("bf16", 8, 32, 32, 1, 4096, 128),
    Shape("bf16", 1, 32, 8, 1, 32768, 128),
    Shape("bf16", 16, 32, 8, 1, 8192, 128),
    Shape("bf16", 1, 32, 32, 16, 8192, 128),
    Shape("bf16", 8, 12, 12, 512, 512, 128),
    Shape("bf16", 8, 16, 16, 1024, 1024, 64, causal=True),
    Shape("bf16", 1, 12, 12, 384, 384, 64),
    *(
        Shape("bf16", batch, 32, 8, 1, keys, 128, stored=stored)
        for batch, keys, stored in (
            (1, 8192, "i8"), (8, 8192, "i8"), (1, 131_072, "i8"), (8, 8192, "f8e4m3"),
        )
    ),
)  # fmt: skip


def _attended(attend: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    return attend(q, k, v, **options)


def _decoded(torch: Any, shape: Shape, q: Any, k: Any, v: Any, **scales: Any) -> dict[str, Any]:
    """What PyTorch is given: keys and values in the queries' type."""
    k, v = (x.to(q.dtype) for x in (k, v))
    if scales:
        k, v = k * scales["ks"][..., None], v * scales["vs"][..., None]
    return {"q": q, "k": k, "v": v}


def _part(shape: Shape, result: Any) -> Any:
    """Of the last of the batch, the first and the last head, and 256 queries at most."""
    return result[-1][[0, shape.heads - 1]][:, max(0, shape.queries - 256) :]


def _exact(torch: Any, shape: Shape, **given: Any) -> Any:
    given = _decoded(torch, shape, **given)
    first = max(0, shape.queries - 256)
    share = shape.heads // shape.groups
    found = []
    for head in (0, shape.heads - 1):
        queries = given["q"][-1, head, first:].double()
        keys, values = (given[x][-1, head // share].double() for x in "kv")
        scores = queries @ keys.T / math.sqrt(shape.size)
        if shape.causal:
            at = torch.arange(first, shape.queries, device=scores.device)[:, None]
            later = torch.arange(shape.keys, device=scores.device)[None, :]
            scores = scores.masked_fill(later > at + shape.keys - shape.queries, -math.inf)
        found.append(torch.softmax(scores, -1) @ values)
    return torch.stack(found)


def attention(torch: Any) -> Iterator[Case]:
    for shape in SHAPES:
        yield shape.case(torch)


FAMILIES = {"attention": attention}
