"""The lines that a product's tile ends in are asked for before the tile is computed."""

from __future__ import annotations

import pytest

from stagefuse.compiler.cpu.emit import AS_WRITTEN, module_text

from .ir_cases import kernels_of, of_text

HEAD = "pipeline main(x: f32[M, 96], y: f32[96, N], z: f32[N]) -> f32[M, N]\nwhere N in 1..=999:\n"


def fetches(body: str, level: str) -> int:
    kernels = list(kernels_of(of_text(HEAD + body).passed()))
    text, *_ = module_text(kernels, level).split(AS_WRITTEN)  # the micro-kernels fetch panels
    return text.count("call void @llvm.prefetch.p0(")


@pytest.mark.parametrize("level", ["v3", "v4"])
def test_a_product_fetches_its_result(level: str) -> None:
    assert fetches("    x @ y + z\n", level) == 1
    assert fetches("    exp(x @ y) * 2.0\n", level) == 1


def test_other_kernels_do_not() -> None:
    assert fetches("    sum(x, axis=1, keepdims=True) + sum(y, axis=0, keepdims=True)\n", "v4") == 0
