"""Products by weights in blocks of 2, 4 and 8 bits, as ONNX Runtime's quantizer writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

import stagefuse as sf
from stagefuse.compiler.driver import compile_program
from stagefuse.compiler.front import check_text
from stagefuse.dsl.source import Source
from stagefuse.onnx import OnnxError, import_model

from . import models
from .models import F32, node

Array = np.ndarray[Any, Any]
CASES = [(4, 256, 272, 32, "packed"), (4, 200, 24, 32, ""), (8, 96, 17, 16, "packed"),
         (2, 64, 33, 16, "packed"), (4, 128, 16, 128, "real")]  # fmt: skip
"""Bits, depth, columns, size of a block, and how zero points are given."""


def packed(codes: Array, bits: int) -> Array:
    """Codes in bytes, the first ones lowest; each row begins a byte."""
    each = 8 // bits
    codes = np.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, -codes.shape[-1] % each)])
    parts = codes.reshape(*codes.shape[:-1], -1, each) << np.arange(each) * bits
    return np.bitwise_or.reduce(parts, axis=-1).astype(np.uint8)


def block_model(
    case: tuple[int, int, int, int, str], rng: np.random.Generator, **attributes: Any
) -> tuple[models.ModelProto, Array]:
    """A product, and the matrix [N, K] that it is by."""
    bits, depth, columns, size, zeros = case
    shape = (columns, -(-depth // size))
    codes = rng.integers(0, 1 << bits, (*shape, size))
    scale = rng.standard_normal(shape).astype(np.float32)
    zero = np.full(shape, 1 << bits - 1, np.float32)
    weights = {"q": packed(codes, bits), "s": scale.reshape(-1)}
    if zeros == "packed":
        whole = rng.integers(0, 1 << bits, shape)
        zero, weights["z"] = whole.astype(np.float32), packed(whole, bits).reshape(-1)
    elif zeros:
        zero = weights["z"] = rng.standard_normal(shape).astype(np.float32)
    product = node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", K=depth,
                   N=columns, bits=bits, block_size=size, **attributes)  # fmt: skip
    made = models.model([product], {"x": (F32, ["batch", depth])}, ["y"], weights)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    matrix = (codes.astype(np.float32) - zero[:, :, None]) * scale[:, :, None]
    return made, matrix.reshape(columns, -1)[:, :depth]


@pytest.mark.parametrize("case", CASES)
def test_products_by_blocks(
    case: tuple[int, int, int, int, str], rng: np.random.Generator
) -> None:
    made, matrix = block_model(case, rng)
    found = import_model(made)
    x = rng.standard_normal((3, case[1])).astype(np.float32)
    y = sf.compile(found.text, weights={"w": found.arrays})(x=x)
    size = np.abs(x).astype(float) @ np.abs(matrix).T.astype(float)
    exact = x.astype(float) @ matrix.T.astype(float)
    assert np.all(np.abs(y - exact) <= 2 * case[1] * 2.0**-24 * size)


def test_blocks_stay_small(rng: np.random.Generator, tmp_path: Any) -> None:
    """4 bits for a code, and for each 32 of them a scale in f32 and a zero point in a byte."""
    found = import_model(block_model(CASES[0], rng)[0])
    program, problems, load = check_text(
        Source("m.pipe", found.text), tmp_path, {"w": found.arrays}
    )
    assert not problems
    plan = compile_program(program, load, levels=("v3",))
    assert sum(a.nbytes for a in plan.arrays.values()) * 8 <= 5.25 * 256 * 288


def test_what_blocks_cannot_be(rng: np.random.Generator) -> None:
    made, _ = block_model(CASES[0], rng)
    made.graph.node[0].input.append("q")  # the order of blocks
    with pytest.raises(OnnxError, match="another order"):
        import_model(made)
