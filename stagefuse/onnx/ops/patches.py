"""Elements chosen or put together by positions that are known while importing; a few others."""

from __future__ import annotations

from itertools import permutations

import numpy as np

from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node
from stagefuse.onnx.reading import dtype_of
from stagefuse.onnx.record import op
from stagefuse.onnx.text import listed

from .shapes import subscript

MAX_DET = 4
"""Rows of a matrix whose determinant is written out: it has 24 terms then."""


@op("Col2Im")
def _col2im(n: Node) -> str:
    """Blocks added where they came from: the inverse of taking an image's windows."""
    image, block = n.ints(1, "image_shape"), n.ints(2, "block_shape")
    rank = len(image)
    strides = n.attr("strides") or [1] * rank
    dilations = n.attr("dilations") or [1] * rank
    pads = n.attr("pads") or [0] * (2 * rank)
    whole = [d + pads[k] + pads[k + rank] for k, d in enumerate(image)]
    counts = [
        (whole[k] - dilations[k] * (block[k] - 1) - 1) // strides[k] + 1 for k in range(rank)
    ]
    at = [
        np.arange(block[k])[:, None] * dilations[k] + np.arange(counts[k]) * strides[k]
        for k in range(rank)
    ]
    places = np.zeros((*block, *counts), np.int64)
    for k in range(rank):
        shape = [1] * (2 * rank)
        shape[k], shape[rank + k] = block[k], counts[k]
        places = places * whole[k] + at[k].reshape(shape)
    batch, width = n.val(0).shape[0], n.val(0).shape[1]
    size, inside = int(np.prod(whole)), int(np.prod(block))
    channels = width.as_int()
    if channels is None or channels % inside:
        raise Refused(f"{width} rows of blocks of {inside}", "a multiple")
    lead = f"{batch}, {channels // inside}"
    x = n.let("blocks", f"reshape({n.x(0)}, [{lead}, {places.size}])").text
    ids = n.x_of(n.constant("places", places.reshape(-1)))
    base = f"zeros([{lead}, {size}], {n.val(0).dtype})"
    added = n.let("added", f"scatter_add({base}, {ids}, {x}, axis=2)").text
    added = n.let("image", f"reshape({added}, [{lead}, {listed(whole).strip('[]')}])").text
    cuts = {f"a{k + 2}": f"{pads[k]}:{pads[k] + image[k]}" for k in range(rank)}
    return f"{added}[{subscript(rank + 2, **cuts)}]"


@op("Det")
def _det(n: Node) -> str:
    """By its definition: a sum over permutations."""
    size = n.val(0).shape[-1].as_int()
    if size is None or not 1 <= size <= MAX_DET:
        raise Refused(f"the determinant of {n.val(0).shape[-1]} rows", f"at most {MAX_DET}")
    x = n.bound(n.val(0))
    terms = []
    for order in permutations(range(size)):
        odd = sum(a > b for k, a in enumerate(order) for b in order[k + 1 :]) % 2
        factors = " * ".join(f"{x}[..., {row}, {column}]" for row, column in enumerate(order))
        terms.append(f"{'-' if odd else '+'} {factors}")
    return " ".join(terms).removeprefix("+ ")


@op("BitCast")
def _bit_cast(n: Node) -> str:
    """Integers of one width: conversion wraps, and so keeps every bit."""
    own, to = n.val(0).dtype, dtype_of(n.attr("to"))
    if own.is_float or to.is_float or own.bits != to.bits:
        raise Refused(f"the bits of {own} as {to}", "integers of one width", "to")
    return f"{to}({n.x(0)})"


@op("ai.onnx.ml::Binarizer")
def _binarizer(n: Node) -> str:
    return f"{n.val(0).dtype}({n.x(0)} > {n.attr('threshold', 0.0)!r})"


@op("ai.onnx.ml::ArrayFeatureExtractor")
def _feature_extractor(n: Node) -> str:
    """Columns of the last axis."""
    value, ids = n.val(0), n.let("columns", f"reshape({n.x(1)}, [-1])").text
    found = f"{n.bound(value)}[..., {ids}]"
    return f"({found})[None, :]" if value.rank == 1 else found
