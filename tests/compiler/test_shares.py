"""Which quotients become products with a reciprocal: those of a softmax and no others."""

from __future__ import annotations

import pytest

from stagefuse.compiler.kernel_text import print_kernel

from .ir_cases import kernels_of, of_text

HEAD = "import nn\npipeline main(x: f32[M, N], m: bool[M, N]) -> f32[M, N]\nwhere N in 1..=999:\n"
ROW = "axis=-1, keepdims=True"
E = f"    e = exp(x - max(x, {ROW}))\n"
SHARES = {
    "softmax": "    nn.softmax(x)\n",
    "another axis": "    nn.softmax(x, axis=0)\n",
    "masked": "    nn.masked_softmax(x, m)\n",
    "by hand": f"{E}    e / sum(e, {ROW})\n",
}
QUOTIENTS = {
    "may be small": f"    e = exp(x)\n    e / sum(e, {ROW})\n",
    "another maximum": f"    e = exp(x - max(x, axis=0, keepdims=True))\n    e / sum(e, {ROW})\n",
    "another sum": f"{E}    e / sum(e * e, {ROW})\n",
    "unbounded": f"    e = select(m, exp(x - max(x, {ROW})), 0.0)\n    e / sum(e, {ROW})\n",
    "length": "    nn.l2_normalize(x)\n",
}


def has_reciprocal(body: str) -> bool:
    texts = [print_kernel(k) for k in kernels_of(of_text(HEAD + body).passed())]
    found = any("reciprocal.f32" in text for text in texts)
    assert found != any("div.f32" in text for text in texts)
    return found


@pytest.mark.parametrize("name", SHARES)
def test_a_softmax_multiplies(name: str) -> None:
    assert has_reciprocal(SHARES[name])


@pytest.mark.parametrize("name", QUOTIENTS)
def test_other_quotients_divide(name: str) -> None:
    assert not has_reciprocal(QUOTIENTS[name])
