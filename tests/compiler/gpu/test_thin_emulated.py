"""Products of few rows, reductions of rows and columns, and products split along their depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.gpu.matmul import split_depth
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES

from .gpu_run import ARCHES, Emulated, check_legal, compiled, launches

ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "f64": 2.0**-53}
PRODUCT = "pipeline p(x: {0}[{1}, {2}], w: {0}[{3}]) -> {0}[{1}, {4}]:\n    {5}\n"


def product(dtype: str, rows: int | str, depth: int, columns: int, lies: str) -> str:
    """A product with a weight that lies along its columns or along its depth."""
    shape, text = f"{depth}, {columns}", "x @ w"
    if lies == "deep":
        shape, text = f"{columns}, {depth}", "x @ transpose(w, [1, 0])"
    return PRODUCT.format(dtype, rows, depth, shape, columns, text)


def check(found: np.ndarray, left: np.ndarray, right: np.ndarray, dtype: str) -> None:
    """Within rounding of the sum's steps in f32 and of the result."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    wide = "f64" if dtype == "f64" else "f32"
    bound = np.abs(a) @ np.abs(b) * (a.shape[1] + 2) * ROUNDING[wide]
    wanted = a @ b
    error = np.abs(found.astype(np.float64) - wanted)
    assert np.all(error <= bound + np.abs(wanted) * ROUNDING[dtype] * 1.01 + 1e-37)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("lies", ["deep", "across"])
@pytest.mark.parametrize(
    ("dtype", "depth", "columns"),
    [
        ("f32", 2304, 40), ("f32", 331, 67), ("f32", 40, 19), ("f64", 97, 34), ("bf16", 520, 72),
        ("f16", 301, 33), ("f32", 1, 50), ("f32", 130, 5), ("bf16", 1100, 1), ("f32", 77, 300),
    ],
)  # fmt: skip
def test_one_row(
    dtype: str, depth: int, columns: int, lies: str, arch: str, tmp_path: Path,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    text = product(dtype, 1, depth, columns, lies)
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    assert all(not x.report["spill bytes"] for x in launches(plan))
    kind = DTYPES[dtype].numpy
    x = rng.standard_normal((1, depth)).astype(kind)
    w = rng.standard_normal((depth, columns)).astype(kind)
    stored = w if lies == "across" else np.ascontiguousarray(w.T)
    (found,) = Emulated(plan, arch)({"x": x, "w": stored}, {})
    check(found, x, w, dtype)


@pytest.mark.parametrize("lies", ["deep", "across"])
@pytest.mark.parametrize(
    ("dtype", "depth", "columns"),
    [
        ("f32", 256, 80), ("f32", 210, 49), ("bf16", 512, 72), ("f16", 208, 104),
        ("bf16", 200, 33), ("f64", 192, 24), ("f32", 600, 16),
    ],
)  # fmt: skip
def test_few_rows(
    dtype: str, depth: int, columns: int, lies: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    arch = list(ARCHES)[(depth + columns + len(lies)) % 3]
    text = product(dtype, "B", depth, columns, lies)
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    assert all(not x.report["spill bytes"] for x in launches(plan))
    emulated, kind = Emulated(plan, arch), DTYPES[dtype].numpy
    w = rng.standard_normal((depth, columns)).astype(kind)
    stored = w if lies == "across" else np.ascontiguousarray(w.T)
    for rows in (0, 1, 2, 16, 32, 33, 70):
        x = rng.standard_normal((rows, depth)).astype(kind)
        (found,) = emulated({"x": x, "w": stored}, {"B": rows})
        check(found, x, w, dtype)


def test_many_columns_by_few_rows_are_split_too(tmp_path: Path) -> None:
    """But where tensor copies bring them, and there are tiles enough."""
    for arch, columns, least, most in (("sm_80", 14336, 3, 16), ("sm_90a", 4096, 0.5, 1)):
        plan = compiled(tmp_path / "p.pipe", product("bf16", 16, 4096, columns, "across"), (arch,))
        parts, whole = launches(plan)
        assert "parts" in parts.label and whole.label.endswith("sum")
        assert least * 132 <= int(parts.grid[0]) <= most * 132
    plan = compiled(tmp_path / "p.pipe", product("bf16", 16, 4096, 14336, "across"), ("sm_90a",))
    assert not any(x.label.endswith("parts") for x in launches(plan))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_many_rows_have_few_parts(dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """What parts take to store and to read again grows with the rows; of 16 bits whole tiles take
    less from a number of rows on, if it is not known."""
    text = product(dtype, 4000, 600, 96, "across")
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    parts, total = launches(plan)
    assert int(parts.grid[0]) == 63 * 2 * 5  # of 64 rows, of 48 columns, and 128 deep
    assert not parts.report["spill bytes"] and not total.report["spill bytes"]
    kind = DTYPES[dtype].numpy
    x, w = (rng.standard_normal(s).astype(kind) for s in ((4000, 600), (600, 96)))
    (found,) = Emulated(plan, "sm_80")({"x": x, "w": w}, {})
    check(found, x, w, dtype)
    plan = compiled(tmp_path / "p.pipe", product(dtype, "M", 1024, 128, "across"), ("sm_80",))
    for rows, split in ((1024, True), (4096, dtype == "f32")):
        found = [
            n.kernel
            for n in launches(plan)
            if "parts" in n.kernel and parse(n.grid[0]).evaluate({"M": rows})
        ]
        assert bool(found) == split, (rows, found)


def test_a_weight_is_read_in_vectors_whichever_way_it_lies(tmp_path: Path) -> None:
    for lies in ("deep", "across"):
        text = product("bf16", 1, 4096, 4096, lies)
        plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
        (launch,) = launches(plan)
        assert "ld.global.nc.v4.b32" in plan.ptx["sm_90a"], lies
        assert int(launch.grid[0]) * launch.block[0] >= 1 << 16, lies


@pytest.mark.parametrize("dtype", ["i8", "u8"])
@pytest.mark.parametrize(
    ("depth", "columns", "group"), [(512, 96, 64), (4096, 5, 32), (1000, 40, 20), (300, 37, 0)]
)
def test_the_dequantisation_of_a_weight_is_part_of_its_loads(
    depth: int, columns: int, group: int, dtype: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """With scales of groups along the depth, the last one with a scale for each column."""
    if group:
        count = depth // group
        text = f"""pipeline p(x: f32[1, {depth}], w: {dtype}[{columns}, {depth}],
           scale: f32[{columns}, {count}]) -> f32[1, {columns}]:
    wide = f32(reshape(w, [{columns}, {count}, {group}])) * scale[:, :, None]
    tanh(x @ transpose(reshape(wide, [{columns}, {depth}]), [1, 0]))
"""
    else:
        text = f"""pipeline p(x: f32[1, {depth}], w: {dtype}[{depth}, {columns}],
           scale: f32[{columns}]) -> f32[1, {columns}]:
    tanh(x @ (f32(w) * scale))
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    assert len(launches(plan)) == 1
    check_legal(plan)
    x = rng.standard_normal((1, depth)).astype(np.float32)
    ends = np.iinfo(DTYPES[dtype].numpy)
    shape = (columns, depth) if group else (depth, columns)
    w = rng.integers(ends.min, ends.max + 1, shape).astype(DTYPES[dtype].numpy)
    scale = rng.random((columns, depth // group) if group else columns).astype(np.float32) / 9000
    (found,) = Emulated(plan)({"x": x, "w": w, "scale": scale}, {})
    each = np.repeat(scale.astype(np.float64), group, axis=1) if group else scale
    wide = w.astype(np.float64) * each
    wanted = np.tanh(x.astype(np.float64) @ (wide.T if group else wide))
    np.testing.assert_allclose(found, wanted, 1e-5, 1e-6)


REDUCTIONS = """pipeline p(x: f32[B, T, 40], i: i32[B, T, 12]) -> (
    f32[B, 40], f32[40], i64[T, 12], bool[B, 12], f32[B, 40], f32[T, 40]):
    a, b, c = max(x, axis=1), sum(x, axis=(0, 1)), sum(i, axis=0)
    a, b, c, any(i > 7, axis=1), mean(x * x, axis=1) + 1.0, min(x, axis=0)
"""


@pytest.mark.parametrize("sizes", [(1, 40), (3, 7), (50, 3), (2, 333), (0, 5), (4, 0)])
def test_columns(sizes: tuple[int, int], tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", REDUCTIONS, ("sm_80",))
    check_legal(plan)
    b, t = sizes
    x = rng.standard_normal((b, t, 40)).astype(np.float32)
    i = rng.integers(0, 9, (b, t, 12)).astype(np.int32)
    found = Emulated(plan, "sm_80")({"x": x, "i": i}, {"B": b, "T": t})
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = [
            np.max(wide, 1, initial=-np.inf), wide.sum((0, 1)), i.sum(0, dtype=np.int64),
            (i > 7).any(1), (wide * wide).sum(1) / t + 1, np.min(wide, 0, initial=np.inf),
        ]  # fmt: skip
    for a, e in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, e, 1e-5, 1e-4)


CONVOLUTION = """import nn

weights w = "w.npz"

pipeline p(x: f32[B, {0}, {1}, {2}], r: f32[B, {3}, {4}, {5}]) -> f32[B, {3}, {4}, {5}]
where B in 1..=64:
    maximum(nn.conv2d(x, w.c, {6}) * w.scale[:, None, None] + r, 0.0)
"""
CONVOLUTIONS = [
    # channels, height, width, out, window, stride, padding, dilation, groups
    (24, 9, 10, 20, 3, 1, 1, 1, 1),
    (24, 3, 4, 20, 3, 1, 1, 1, 1),
    (30, 11, 7, 70, 3, 2, 1, 1, 1),
    (24, 12, 13, 16, 3, 1, 2, 2, 1),
    (17, 14, 9, 33, 5, 3, 2, 1, 1),
    (200, 5, 6, 40, 1, 1, 0, 1, 1),
    (200, 7, 8, 40, 1, 2, 0, 1, 1),
    (48, 8, 8, 32, 3, 1, 1, 1, 2),
    (16, 9, 9, 16, 3, 2, 1, 1, 16),
    (3, 21, 22, 12, 7, 2, 3, 1, 1),
]


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions(
    case: tuple[int, ...], few: bool, tmp_path: Path, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not few:
        monkeypatch.setattr(split_depth, "FULL", 0)
        monkeypatch.setattr(split_depth, "FEW_ROWS", 0)
    channels, height, width, out, window, stride, padding, dilation, groups = case
    reach = dilation * (window - 1)
    tall, wide = ((n + 2 * padding - reach - 1) // stride + 1 for n in (height, width))
    kernel = rng.standard_normal((out, channels // groups, window, window)).astype(np.float32)
    scale = rng.standard_normal(out).astype(np.float32)
    np.savez(tmp_path / "w.npz", **{"c.weight": kernel, "scale": scale})
    how = f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}"
    text = CONVOLUTION.format(channels, height, width, out, tall, wide, how)
    arch = list(ARCHES)[sum(case) % 3]
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    assert all(not x.report["spill bytes"] for x in launches(plan))
    split = any(" parts" in x.label for x in launches(plan))
    depth = -(-channels // 4) * 4 * window * window  # channels are stored in fours
    wanted = few and groups == 1 and depth >= 192
    assert split == wanted or (arch == "sm_90a" and out > 32)  # clusters share the depth there
    for b in (1, 3):
        x = rng.standard_normal((b, channels, height, width)).astype(np.float32)
        r = rng.standard_normal((b, out, tall, wide)).astype(np.float32)
        (found,) = Emulated(plan, arch)({"x": x, "r": r}, {"B": b})
        padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *[(padding, padding)] * 2])
        wanted, most = np.zeros(r.shape), np.zeros(r.shape)
        for m in range(window):
            for n in range(window):
                i, j = m * dilation, n * dilation
                seen = padded[:, :, i : i + stride * tall : stride, j : j + stride * wide : stride]
                seen = seen[:, :, :tall, :wide].reshape(b, groups, -1, tall, wide)
                part = kernel[:, :, m, n].astype(np.float64).reshape(groups, out // groups, -1)
                wanted += np.einsum("bgcij,goc->bgoij", seen, part).reshape(wanted.shape)
                parts = np.abs(seen), np.abs(part)
                most += np.einsum("bgcij,goc->bgoij", *parts).reshape(wanted.shape)
        by = scale.astype(np.float64)[:, None, None]
        depth = kernel[0].size
        bound = (most * np.abs(by) * (depth + 2) + np.abs(r)) * ROUNDING["f32"]
        assert np.all(np.abs(found - np.maximum(wanted * by + r, 0)) <= bound * 1.01)


NARROW = {
    # signature, formula, what it is for x, a and q * s
    "one row": ("x: f32[1, 512]) -> f32[1, 136]", "x @ f32(w.a)", lambda x, a, q: x @ a),
    "rows": ("x: bf16[B, 512]) -> bf16[B, 136]", "x @ w.a", lambda x, a, q: x @ a),
    "turned": (
        "x: bf16[B, 136]) -> bf16[B, 512]", "x @ transpose(w.a, [1, 0])", lambda x, a, q: x @ a.T
    ),
    "wide rows": ("x: f32[B, 512]) -> f32[B, 136]", "x @ f32(w.a)", lambda x, a, q: x @ a),
    "integers": ("x: f32[1, 512]) -> f32[1, 136]", "x @ (f32(w.q) * w.s)", lambda x, a, q: x @ q),
    "table": ("x: i64[B]) -> f32[B, 136]", "f32(w.a[x])", lambda x, a, q: a[x]),
}  # fmt: skip


@pytest.mark.parametrize("targets", [("h200",), ("cpu", "h200")], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_narrow_weights_are_converted_by_who_reads_them(
    name: str, targets: tuple[str, ...], tmp_path: Path, rng: np.random.Generator
) -> None:
    signature, formula, meaning = NARROW[name]
    a = rng.standard_normal((512, 136)).astype(DTYPES["bf16"].numpy)
    q = rng.integers(-99, 99, (512, 136)).astype(np.int8)
    s = rng.random(136).astype(np.float32)
    save_file({"a": a, "q": q, "s": s}, tmp_path / "w.safetensors")
    path = tmp_path / "p.pipe"
    path.write_text(f'weights w = "w.safetensors"\npipeline p({signature}:\n    {formula}\n')
    plan = compile_file(path, targets=targets)
    emulated = Emulated(plan)
    stored = [plan.arrays[str(b.array)] for b in emulated.gpu.buffers if b.array is not None]
    # but for scales, which lie in panels where codes do
    assert all(x.dtype.itemsize < 4 or x.size in (136, 144) for x in stored)
    argument = emulated.pipeline.inputs[0]
    shape = [5 if d == "B" else int(d) for d in argument.shape]
    x = rng.standard_normal(shape) if argument.dtype != "i64" else rng.integers(0, 512, shape)
    x = x.astype(DTYPES[argument.dtype].numpy)
    (found,) = emulated({"x": x}, {"B": 5})
    wide = x if argument.dtype == "i64" else x.astype(np.float64)
    wanted = meaning(wide, a.astype(np.float64), q * s.astype(np.float64))
    step = 2.0**-8 if found.dtype.itemsize == 2 else 1e-5
    np.testing.assert_allclose(found.astype(np.float64), wanted, step, 1e-3)
    if "cpu" in targets:
        cpu = [plan.arrays[str(b.array)] for b in emulated.pipeline.buffers if b.array is not None]
        assert name in ("table", "integers") or all(x.dtype == np.float32 for x in cpu)
