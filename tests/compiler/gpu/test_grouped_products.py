"""What follows a convolution in groups is computed where its tiles are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as saved

from .gpu_run import Emulated, check_legal, compiled, launches
from .test_convolutions_emulated import DTYPES, UNIT, convolved

BLOCK = """
import nn
weights w = "w.safetensors"
pipeline p(x: KIND[B, 24, 7, 6]) -> KIND[B, 24, 7, 6]
where B in 1..=8:
    h = nn.relu(nn.conv2d(x, w.a))
    g = nn.conv2d(h, w.g, padding=1, groups=GROUPS)
    h = nn.relu(g * w.scale[:, None, None] + w.shift[:, None, None] + h)
    nn.conv2d(h, w.b) + x
"""


def weights_of(groups: int, rng: np.random.Generator) -> dict[str, Any]:
    shapes = {
        "a.weight": (24, 24, 1, 1), "a.bias": (24,), "g.weight": (24, 24 // groups, 3, 3),
        "g.bias": (24,), "scale": (24,), "shift": (24,), "b.weight": (24, 24, 1, 1),
        "b.bias": (24,),
    }  # fmt: skip
    return {n: rng.standard_normal(s) / max(np.prod(s[1:]), 1) ** 0.5 for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("kind", "groups", "arch"),
    [("f16", 3, "sm_90a"), ("bf16", 6, "sm_80"), ("f32", 2, "sm_90a"), ("f16", 4, "sm_89")],
)
def test_a_block_in_groups_is_three_products(
    kind: str, groups: int, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    dtype = DTYPES[kind]
    w = {n: a.astype(dtype) for n, a in weights_of(groups, rng).items()}
    (tmp_path / "w.safetensors").write_bytes(saved(w))
    text = BLOCK.replace("KIND", kind).replace("GROUPS", str(groups))
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    (middle,) = [x for x in launches(plan) if "mul" in x.report["fused"]]
    assert {"matmul", "maximum"} <= set(middle.report["fused"])
    apart = [x for x in launches(plan) if "matmul" not in x.report["fused"]]
    assert not any("maximum" in x.report["fused"] for x in apart)
    assert all(x.report["spill bytes"] == 0 for x in launches(plan) if "registers" in x.report)
    x = rng.standard_normal((3, 24, 7, 6)).astype(dtype)
    (got,) = Emulated(plan, arch)({"x": x}, {"B": 3})

    def stored(a: Any) -> Any:
        return a.astype(dtype).astype(float)

    f, given = {n: a.astype(float) for n, a in w.items()}, x.astype(float)
    along = {n: f[n][:, None, None] for n in ("a.bias", "g.bias", "b.bias", "scale", "shift")}
    h = stored(np.maximum(convolved(given, f["a.weight"], dict(size=1)) + along["a.bias"], 0))
    deep = dict(size=3, padding=1, groups=groups)
    g = convolved(h, f["g.weight"], deep) + along["g.bias"]
    h = stored(np.maximum(g * along["scale"] + along["shift"] + h, 0))
    wanted = convolved(h, f["b.weight"], dict(size=1)) + along["b.bias"] + given
    # each element of h is off by some roundings of what it is the sum of, which b then adds up
    parts = convolved(np.abs(given), np.abs(f["a.weight"]), dict(size=1)) + np.abs(along["a.bias"])
    inner = convolved(parts, np.abs(f["g.weight"]), deep) + np.abs(along["g.bias"])
    inner = inner * np.abs(along["scale"]) + np.abs(along["shift"]) + parts
    outer = convolved(inner, np.abs(f["b.weight"]), dict(size=1)) + np.abs(along["b.bias"])
    unit = UNIT[kind] + 400 * 2.0**-24  # of three sums of at most 24, 108 and 24 products
    assert np.all(np.abs(got.astype(float) - wanted) <= 12 * unit * (outer + np.abs(given)))


def test_channels_stay_last_after_groups(tmp_path: Path, rng: np.random.Generator) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: f16[2, 16, 6, 8], w: f16[32, 4, 3, 3]) -> f16[2, 32, 3, 4]:\n"
        "    edges = [(0, 0), (0, 0), (1, 1), (1, 1)]\n"
        "    nn.max_pool(nn.relu(nn.convolve2d(pad(x, edges), w, 1, 1, 4)), 2, stride=2)\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    made = [x.report["fused"] for x in launches(plan) if x.report["fused"]]
    assert [fused[-1] for fused in made] == ["maximum", "max"], made
    inputs = {
        n: rng.standard_normal(s).astype(np.float16)
        for n, s in {"x": (2, 16, 6, 8), "w": (32, 4, 3, 3)}.items()
    }
    (got,) = Emulated(plan, "sm_80")(inputs, {})
    x, w = (inputs[n].astype(float) for n in ("x", "w"))
    case = dict(size=3, padding=1, groups=4)
    wanted, scale = np.maximum(convolved(x, w, case), 0), convolved(np.abs(x), np.abs(w), case)
    wanted, scale = (v.reshape(2, 32, 3, 2, 4, 2).max((3, 5)) for v in (wanted, scale))
    assert np.all(np.abs(got.astype(float) - wanted) <= 2.0**-10 * scale)


def test_a_sum_of_two_products_finishes_the_one_that_nothing_else_reads(tmp_path: Path) -> None:
    text = (
        "import nn\n"
        "pipeline p(x: f16[2, 16, 6, 8], w: f16[16, 4, 3, 3], v: f16[16, 16, 1, 1])"
        " -> f16[2, 16, 6, 8]:\n"
        "    edges = [(0, 0), (0, 0), (1, 1), (1, 1)]\n"
        "    y = nn.convolve2d(pad(x, edges), w, 1, 1, 4)\n"
        "    nn.relu(y + nn.convolve2d(y, v, 1, 1, 1))\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    (last,) = [x for x in launches(plan) if "maximum" in x.report["fused"]]
    assert {"matmul", "add", "maximum"} <= set(last.report["fused"])
