"""What there is one of for each row, stored by the kernel that also computes the row's elements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stagefuse as sf

from .gpu_run import ARCHES, Emulated, check_legal, compiled, launches

QUANTIZED = """\
pipeline p(x: f32[B, {n}], r: f32[B, {n}]) -> (i8[B, {n}], f32[B{one}]){where}:
    y = x + r
    s = max(abs(y), axis=-1{keep}) / 127.0 + 1e-6
    i8(round(y / s{spread})), s
"""
NORMED = """\
pipeline p(x: f32[B, {n}], r: f32[B, {n}]) -> (f32[B, {n}], f32[B, 1]){where}:
    c = x - mean(x, axis=-1, keepdims=True)
    s = rsqrt(mean(c * c, axis=-1, keepdims=True) + 1e-5)
    c * s + r, s
"""


def _expected(source: str, x: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, r = x.astype(np.float64), r.astype(np.float64)
    if source == NORMED:
        c = x - x.mean(-1, keepdims=True)
        s = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + 1e-5)
        return c * s + r, s
    y = x + r
    s = np.abs(y).max(-1, keepdims=True) / 127 + 1e-6
    return y / s, s


@pytest.mark.parametrize("n", ["200", "N"])
@pytest.mark.parametrize(
    ("source", "keep"), [(QUANTIZED, True), (QUANTIZED, False), (NORMED, True)],
    ids=["quantized", "quantized along", "normed"],
)  # fmt: skip
def test_scales_of_rows_are_stored_beside_what_they_scale(
    source: str, n: str, keep: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = source.format(
        n=n, where="\nwhere N in 1..=3000" if n == "N" else "", one=", 1" if keep else "",
        keep=", keepdims=True" if keep else "", spread="" if keep else "[:, None]",
    )  # fmt: skip
    count = 200 if n == "200" else int(rng.integers(1, 300))
    x, r = rng.normal(size=(2, 5, count)).astype(np.float32)
    wanted, scales = _expected(source, x, r)
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    check_legal(plan)
    roots = {tuple(x.writes) for x in launches(plan)}
    assert len(roots) == 1 and len(next(iter(roots))) == 2  # each version stores both
    dims = {"B": 5, **({"N": count} if n == "N" else {})}
    pipe = sf.compile(tmp_path / "p.pipe")
    for found, own in (Emulated(plan)({"x": x, "r": r}, dims), pipe(x=x, r=r)):
        # rounding to i8 is off by half at most; what was rounded before by 8 units of f32
        close = 8 * 2.0**-23 * max(np.abs(wanted).max(), 127) + 0.5 * (source == QUANTIZED)
        assert np.abs(found.astype(np.float64) - wanted).max() <= close
        np.testing.assert_allclose(own.reshape(scales.shape), scales, rtol=1e-5)


@pytest.mark.parametrize("n", ["13", "40", "N"])
def test_what_one_lane_reads_for_its_row_is_read_by_all_for_its_elements(
    n: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = f"""\
pipeline p(x: f32[3, {n}], v: f32[3], w: f32[{n}]):
    x + v[:, None], v + sum(x, axis=1), x * w, w - max(x, axis=0)
"""
    count = int(rng.integers(1, 300)) if n == "N" else int(n)
    x = rng.normal(size=(3, count)).astype(np.float32)
    v, w = (rng.normal(size=s).astype(np.float32) for s in (3, count))
    plan = compiled(tmp_path / "p.pipe", text)
    wanted = x + v[:, None], v + x.astype(np.float64).sum(1), x * w, w - x.max(0)
    for arch in ARCHES:
        given = {"x": x, "v": v, "w": w}
        found = Emulated(plan, arch)(given, {"N": count} if n == "N" else {})
        close = 2.0**-22 * count * np.abs(x).max()  # a rounding of the sum for each element
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2.0**-22, atol=close)
