"""The older interface to the tensor cores: fragments whose layout is the implementation's choice.

Here element `j` of lane `l` is number `(E l + j) mod size` of the matrix in row-major order, where
`E` is how many a lane holds; some matrices are held more than once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..access import load, store
from ..errors import Stop
from ..operands import address, elements, getter, putter
from ..program import Run, Site
from ..values import DTYPES
from ..warpgroup_product import decode
from . import effect

if TYPE_CHECKING:
    from ..machine import Group

Array = NDArray[Any]
LANES = 32
_ELEMENTS = {"bf16": "b16", "tf32": "b32", "f16": "b16", "s8": "b8", "u8": "b8"}


def _sizes(site: Site) -> tuple[int, int, int]:
    found = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", site.word("P"))
    assert found is not None
    m, n, k = map(int, found.groups())
    return m, n, k


def _matrix(site: Site, operand: str) -> tuple[int, int]:
    m, n, k = _sizes(site)
    return {"a": (m, k), "b": (k, n)}.get(operand, (m, n))


def _numbers(g: Group, each: int, size: int) -> Array:
    """The numbers of the elements that each thread holds, `[n][each]`."""
    lane = g.threads() % LANES
    found: Array = (lane[:, None] * each + np.arange(each)) % size
    return found


def _offsets(numbers: Array, shape: tuple[int, int], layout: str, stride: Array) -> Array:
    """Positions in memory, in elements, of numbered elements."""
    row, column = numbers // shape[1], numbers % shape[1]
    ld = stride[:, None]
    found: Array = row * ld + column if layout == "row" else column * ld + row
    return found


def _stride(site: Site, g: Group, shape: tuple[int, int], layout: str) -> Array:
    natural = shape[1] if layout == "row" else shape[0]
    if not site.has("s"):
        return np.full(g.n, natural, np.int64)
    return np.broadcast_to(getter(site, site.operand("s"), "u32")(g), g.n).astype(np.int64)


@effect("wmma.load")
def _load(site: Site) -> Run:
    operand, type_ = site.instruction.modifiers[1], site.instruction.modifiers[-1]
    shape, layout, space = _matrix(site, operand), site.word("L"), site.word("Q")
    dtype = DTYPES[_ELEMENTS.get(type_, f"b{DTYPES[type_].itemsize * 8}")]
    base = address(site, "p")
    parts = elements(site.operand("d"))
    width = 8 if type_ == "f64" else 4
    puts = [putter(site, x, f"b{width * 8}") for x in parts]
    each = len(parts) * width // dtype.itemsize

    def run(g: Group) -> None:
        offsets = _offsets(_numbers(g, each, shape[0] * shape[1]), shape, layout,
                           _stride(site, g, shape, layout)) * dtype.itemsize  # fmt: skip
        start = np.broadcast_to(base(g), g.n)
        columns = [load(g, space, start + offsets[:, j], dtype, 1)[0] for j in range(each)]
        packed = np.stack(columns, axis=1).view(f"u{width}")
        for j, put in enumerate(puts):
            put(g, np.ascontiguousarray(packed[:, j]))

    return run


@effect("wmma.store")
def _store(site: Site) -> Run:
    type_ = site.instruction.modifiers[-1]
    shape, layout, space = _matrix(site, "d"), site.word("L"), site.word("Q")
    dtype = DTYPES[_ELEMENTS.get(type_, f"b{DTYPES[type_].itemsize * 8}")]
    base = address(site, "p")
    width = 8 if type_ == "f64" else 4
    gets = [getter(site, x, f"b{width * 8}") for x in elements(site.operand("d"))]
    each = len(gets) * width // dtype.itemsize

    def run(g: Group) -> None:
        offsets = _offsets(_numbers(g, each, shape[0] * shape[1]), shape, layout,
                           _stride(site, g, shape, layout)) * dtype.itemsize  # fmt: skip
        start = np.broadcast_to(base(g), g.n)
        data = np.stack([np.broadcast_to(get(g), g.n) for get in gets], axis=1).view(dtype)
        for j in range(each):
            store(g, space, start + offsets[:, j], [np.ascontiguousarray(data[:, j])])

    return run


def _types(site: Site) -> tuple[str, str, str, str]:
    """The types of D, A, B and C; the oldest form gives only those of D and C."""
    words = [w for w in site.instruction.modifiers[6:] if w != "satfinite"]
    d, *middle, c = words
    a, b = middle if middle else ("f16", "f16")
    return d, a, b, c


@effect("wmma.mma")
def _mma(site: Site) -> Run:
    m, n, k = _sizes(site)
    d_type, a_type, b_type, c_type = _types(site)
    saturate = "satfinite" in site.instruction.modifiers
    gets = {
        name: [
            getter(site, x, "b64" if kind == "f64" else "b32") for x in elements(site.operand(name))
        ]
        for name, kind in (("a", a_type), ("b", b_type), ("c", c_type))
    }
    width = 8 if d_type == "f64" else 4
    puts = [putter(site, x, f"b{width * 8}") for x in elements(site.operand("d"))]

    def matrix(g: Group, name: str, kind: str, shape: tuple[int, int]) -> Array:
        columns = [np.broadcast_to(get(g), g.n) for get in gets[name]]
        raw = np.stack(columns, axis=1).view(np.uint8).reshape(-1, LANES * len(columns) * 8 if
              kind == "f64" else LANES * len(columns) * 4)  # fmt: skip
        if kind == "f64":
            found = raw.view(np.float64)
        elif kind in ("f32", "s32"):
            found = raw.view(DTYPES[kind]).astype(np.float64)
        else:
            found = decode(raw, kind)
        return found[:, : shape[0] * shape[1]].reshape(-1, *shape)

    def run(g: Group) -> None:
        if g.n % LANES:
            raise Stop("barrier", "wmma takes whole warps", int(g.threads()[0]))
        with np.errstate(all="ignore"):
            product = matrix(g, "a", a_type, (m, k)) @ matrix(g, "b", b_type, (k, n))
            total = product + matrix(g, "c", c_type, (m, n))
            if d_type == "s32":
                whole = total.astype(np.int64)
                whole = np.clip(whole, -(2**31), 2**31 - 1) if saturate else whole
                made = whole.astype(np.int32)
            else:
                made = total.astype(DTYPES[d_type])
        packed = made.reshape(g.n, -1).view(f"u{width}")
        for j, put in enumerate(puts):
            put(g, np.ascontiguousarray(packed[:, j]))

    return run
