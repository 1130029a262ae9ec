"""Attention kernels in the emulator: every mask, dtype and odd size against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.errors import VerifyError
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.gpu.attention import lowering as attention
from stagefuse.compiler.gpu.attention import warp_roles
from stagefuse.compiler.gpu.compile import JOINS
from stagefuse.compiler.gpu.drafts import drafts
from stagefuse.compiler.kernel_ir import Attend, Kernel, Local
from stagefuse.compiler.kernel_text import parse_kernel, print_kernel
from stagefuse.compiler.kernel_verify import verify_kernel
from stagefuse.compiler.lower import Sites, finish
from stagefuse.compiler.plan import Plan
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import F32
from stagefuse.dsl.facts import Facts

from ..ir_cases import of_text
from .gpu_run import Emulated, check_legal, compiled, launches

DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16),
          "bf16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
"""Half the distance of numbers from 1 on: the most that rounding loses."""


@dataclass(frozen=True)
class Case:
    """Sizes are of queries [B, H, T, D], keys [B, G, S, D] and values [B, G, S, V]."""

    dtype: str
    sizes: tuple[int, int, int, int, int]  # B, H, G, T, S
    head: int
    values: int
    mask: str = ""
    arch: str = "sm_80"

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        return f"{self.dtype}-{sizes}-{self.head}-{self.values}-{self.mask or 'all'}-{self.arch}"


def attend(case: Case, path: Path, *more: str) -> Plan:
    _, heads, groups, _, _ = case.sizes
    data = ", mask: bool[B, S]" if "mask" in case.mask else ""
    given = ", mask=mask[:, None, None, :]" if data else ""
    given += ", causal=True" if "causal" in case.mask else ""
    e, d, v = case.dtype, case.head, case.values
    queries, keys, values = (
        f"{e}[B, {n}]" for n in (f"{heads}, T, {d}", f"{groups}, S, {d}", f"{groups}, S, {v}")
    )
    text = f"""import nn

pipeline p(q: {queries}, k: {keys}, v: {values}{data}) -> {e}[B, {heads}, T, {v}]
where B in 0..=8, T in 0..=4096, S in 0..=4096:
    nn.attend(q, k, v{given})
"""
    return compiled(path, text, (case.arch, *more))


def arrays(case: Case, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, int]]:
    b, h, g, t, s = case.sizes
    shapes = {"q": (b, h, t, case.head), "k": (b, g, s, case.head), "v": (b, g, s, case.values)}
    dtype = DTYPES[case.dtype]
    inputs: dict[str, Any] = {
        n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()
    }
    if "mask" in case.mask:
        inputs["mask"] = rng.random((b, s)) < 0.7
        inputs["mask"][:1] = False
    return inputs, {"B": b, "T": t, "S": s}


def expected(case: Case, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """The results in float64, and what may be lost of each at most.

    A score loses depth + 4 roundings of its terms, each of 2^-22 since tf32 parts are, and a
    weight as much relatively, besides its exponential's 2^-21; sums over the keys a rounding for
    each; 16-bit weights and results half a unit each.
    """
    b, h, g, t, s = case.sizes
    q, k, v = (inputs[n].astype(np.float64) for n in "qkv")
    k, v = (np.repeat(x, h // g, axis=1) for x in (k, v))
    scale = 1 / math.sqrt(case.head)
    scores = np.einsum("bhtd,bhsd->bhts", q, k) * scale
    terms = np.einsum("bhtd,bhsd->bhts", abs(q), abs(k)) * scale
    keep = np.ones((b, 1, t, s), bool)
    if "mask" in case.mask:
        keep = keep & inputs["mask"][:, None, None, :]
    if "causal" in case.mask:
        keep = keep & (np.arange(s)[None, :] <= np.arange(t)[:, None] + (s - t))
    kept = np.where(keep, scores, -np.inf)
    most = np.maximum(kept.max(axis=-1, keepdims=True, initial=-1e30), -1e30)
    weights = np.exp(kept - most)
    total = weights.sum(axis=-1, keepdims=True)
    shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    lost = (case.head + 4) * 2.0**-22 * terms.max(axis=-1, keepdims=True, initial=0)
    unit = UNIT[case.dtype]
    lost = 2 * lost + (s + 8) * 2.0**-22 + (2 * unit if case.dtype != "f32" else 0)
    return shares @ v, lost * (shares @ abs(v)) + unit * 2.0**-6


def check(case: Case, plan: Plan, rng: np.random.Generator) -> None:
    inputs, dims = arrays(case, rng)
    (found,) = Emulated(plan, case.arch)(inputs, dims)
    wanted, lost = expected(case, inputs)
    assert found.shape == wanted.shape
    off = abs(found.astype(np.float64) - wanted) - lost
    assert off.size == 0 or off.max() <= 0, (case, off.max())


CASES = [
    Case("f32", (2, 2, 2, 9, 11), 32, 32),
    Case("f32", (1, 6, 2, 65, 97), 64, 64, "mask causal", "sm_89"),
    Case("f32", (1, 1, 1, 33, 65), 40, 20, "causal", "sm_90a"),
    Case("f32", (1, 2, 2, 3, 31), 5, 17, "mask"),
    Case("f32", (1, 1, 1, 17, 19), 128, 100, "", "sm_89"),
    Case("f32", (1, 1, 1, 5, 13), 256, 256, "causal", "sm_90a"),
    Case("bf16", (1, 4, 2, 70, 100), 64, 64, "mask causal", "sm_90a"),
    Case("bf16", (2, 2, 2, 1, 129), 128, 128, "", "sm_80"),
    Case("bf16", (1, 1, 1, 19, 33), 80, 96, "mask", "sm_89"),
    Case("f16", (1, 2, 1, 67, 130), 64, 64, "causal", "sm_80"),
    Case("f16", (1, 2, 1, 20, 34), 20, 40, "", "sm_90a"),
    Case("f16", (1, 1, 1, 18, 37), 256, 256, "mask", "sm_89"),
    Case("f32", (1, 2, 2, 3, 0), 16, 16),
    Case("bf16", (1, 2, 2, 130, 300), 128, 128, "causal", "sm_90a"),
    Case("f16", (1, 1, 1, 140, 129), 128, 64, "mask causal", "sm_90a"),
    Case("f16", (1, 2, 1, 200, 290), 64, 64, "", "sm_90a"),
    Case("bf16", (1, 1, 1, 40, 150), 256, 256, "causal", "sm_90a"),
    Case("bf16", (1, 1, 1, 3, 1), 64, 256, "", "sm_90a"),
    Case("bf16", (1, 1, 1, 131, 5), 64, 64, "causal", "sm_90a"),
    Case("bf16", (1, 4, 2, 1, 600), 64, 64, "", "sm_80"),
    Case("bf16", (1, 8, 2, 3, 515), 128, 128, "mask causal", "sm_90a"),
    Case("f16", (2, 3, 3, 2, 530), 20, 40, "causal", "sm_89"),
    Case("f32", (2, 4, 1, 1, 700), 64, 64, "mask"),
    Case("f32", (1, 6, 2, 6, 513), 32, 48, "causal", "sm_89"),
    Case("f16", (1, 2, 1, 1, 520), 256, 256, "", "sm_90a"),
    Case("bf16", (1, 2, 2, 3, 0), 16, 16, "mask causal"),
    Case("f32", (1, 2, 2, 0, 3), 16, 16, "causal"),
    Case("f16", (0, 2, 2, 3, 3), 16, 16),
    Case("f32", (1, 2, 2, 7, 3), 16, 16, "causal"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_gives_what_float64_does(
    case: Case, tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = attend(case, tmp_path / "p.pipe")
    check_legal(plan)
    check(case, plan, rng)


@pytest.mark.parametrize(
    "case",
    [
        Case("bf16", (1, 5, 1, 350, 200), 64, 64, "causal", "sm_90a"),
        Case("bf16", (1, 2, 1, 450, 50), 64, 64, "causal", "sm_90a"),
        Case("f16", (1, 3, 3, 130, 140), 128, 64, "mask", "sm_90a"),
        Case("bf16", (1, 2, 2, 140, 120), 256, 256, "", "sm_90a"),
    ],
    ids=str,
)
def test_blocks_stay_for_many_tiles(
    case: Case, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warp_roles, "BLOCKS", 3)
    check(case, attend(case, tmp_path / "p.pipe"), rng)


def test_high_tiles_are_taken_where_they_need_fewer_rounds(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCKS", 3)
    monkeypatch.setattr(warp_roles, "BLOCKS", 2)
    case = Case("bf16", (1, 1, 1, 570, 140), 64, 64, "", "sm_90a")
    plan = attend(case, tmp_path / "p.pipe")
    sizes = {"B": 1, "T": 570, "S": 140}
    grids = {x.kernel: parse(x.grid[0]).evaluate(sizes) for x in launches(plan)}
    assert [n.split("_by_")[1][:3] for n, grid in grids.items() if grid] == ["192"]
    check(case, plan, rng)


@pytest.mark.parametrize("head", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_keeps_all_in_registers(dtype: str, head: int, tmp_path: Path) -> None:
    case = Case(dtype, (1, 8, 2, 1, 1), head, head, "mask causal")
    plan = attend(case, tmp_path / "p.pipe", "sm_89", "sm_90a")
    for gpu in plan.pipelines[0].gpu:
        assert len(gpu.launches) == 3  # of few queries two, and one of many
        for launch in gpu.launches:
            assert launch.report["spill bytes"] == 0, (gpu.arch, launch.report)
            assert launch.report["blocks per SM"] >= 1


HEAD = "pipeline p(q: f32[T, 32], k: f32[S, 32], v: f32[S, 16]{more}) -> f32[T, 16]\n"
RANGES = "where T in 1..=999, S in 1..=2000:\n"
SCORES = "    s[t, j] = sum[d] q[t, d] * k[j, d]\n"


def written(tmp_path: Path, body: str, more: str = "") -> Plan:
    path = tmp_path / "p.pipe"
    return compiled(path, HEAD.format(more=more) + RANGES + SCORES + body, ("sm_80",))


def inputs_of(rng: np.random.Generator, t: int = 21, s: int = 75) -> dict[str, Any]:
    shapes = {"q": (t, 32), "k": (s, 32), "v": (s, 16)}
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


def softmax_of(scores: Any, values: Any) -> Any:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) @ values


BIASED = """    b = s * 0.3 + bias
    e = exp(b - max(b, axis=-1, keepdims=True))
    (e * (1.0 / sum(e, axis=-1, keepdims=True))) @ v
"""


def test_softmax_written_by_hand_with_a_bias(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = written(tmp_path, BIASED, ", bias: f32[T, S]")
    assert len(launches(plan)) == 3
    given = inputs_of(rng)
    given["bias"] = rng.standard_normal((21, 75)).astype(np.float32)
    given["bias"][:, :40] = -np.inf  # whole blocks of keys without a score
    (found,) = Emulated(plan, "sm_80")(given, {"T": 21, "S": 75})
    q, k, v, bias = (given[n].astype(np.float64) for n in ("q", "k", "v", "bias"))
    np.testing.assert_allclose(found, softmax_of(q @ k.T * 0.3 + bias, v), rtol=0, atol=2e-5)


WINDOW = """    near[t in 0..T, j in 0..S] = t - j < 9 and j - t < 3
    kept = select(near, s, -inf)
    e = select(near, exp(kept - max(kept, axis=-1, keepdims=True)), 0.0)
    e / maximum(sum(e, axis=-1, keepdims=True), 1e-7) @ v
"""


def test_a_sliding_window(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = written(tmp_path, WINDOW.replace("-inf", "-1e30"))
    assert len(launches(plan)) == 3
    given = inputs_of(rng, 150, 131)
    (found,) = Emulated(plan, "sm_80")(given, {"T": 150, "S": 131})
    q, k, v = (given[n].astype(np.float64) for n in "qkv")
    apart = np.arange(150)[:, None] - np.arange(131)[None, :]
    near = (apart < 9) & (apart > -3)
    scores = np.where(near, q @ k.T, -1e30)
    e = np.where(near, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    wanted = e / np.maximum(e.sum(axis=-1, keepdims=True), 1e-7) @ v
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


PLAIN = """    e = exp(s - max(s, axis=-1, keepdims=True))
    e / sum(e, axis=-1, keepdims=True) @ v
"""


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_infinities_and_nan_give_what_numpy_gives(
    tmp_path: Path, rng: np.random.Generator, where: str, value: float
) -> None:
    plan = written(tmp_path, PLAIN)
    given = inputs_of(rng)
    given[where][3, 5] = value
    (found,) = Emulated(plan, "sm_80")(given, {"T": 21, "S": 75})
    q, k, v = (given[n].astype(np.float64) for n in "qkv")
    with np.errstate(invalid="ignore"):
        wanted = softmax_of(q @ k.T, v)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_rows_without_a_score_are_nan_as_softmax_says(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = written(tmp_path, BIASED, ", bias: f32[T, S]")
    given = inputs_of(rng)
    given["bias"] = np.zeros((21, 75), np.float32)
    given["bias"][4] = -np.inf
    (found,) = Emulated(plan, "sm_80")(given, {"T": 21, "S": 75})
    assert np.isnan(found[4]).all() and not np.isnan(np.delete(found, 4, axis=0)).any()


COMPUTED = """import nn

pipeline p(q: f32[T, 32], k: f32[S, 32], v: f32[16, S]) -> f32[T, 16]
where T in 1..=999, S in 1..=2000:
    turned = sin(k) * 2.0
    nn.softmax(q @ transpose(turned, [1, 0])) @ transpose(v, [1, 0])
"""


def test_keys_in_panels_and_values_the_other_way(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", COMPUTED, ("sm_80",))
    given = inputs_of(rng, 35, 101)
    given["v"] = rng.standard_normal((16, 101)).astype(np.float32)
    (found,) = Emulated(plan, "sm_80")(given, {"T": 35, "S": 101})
    q, k, v = (given[n].astype(np.float64) for n in "qkv")
    np.testing.assert_allclose(found, softmax_of(q @ (2 * np.sin(k)).T, v.T), rtol=0, atol=1e-4)


def test_the_same_sizes_give_the_same_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    case = Case("f32", (1, 2, 2, 40, 90), 32, 32, "causal")
    plan = attend(case, tmp_path / "p.pipe")
    inputs, dims = arrays(case, rng)
    first, second = (Emulated(plan, "sm_80")(inputs, dims)[0] for _ in range(2))
    assert first.tobytes() == second.tobytes()


def attention_kernels(source: str) -> tuple[list[Kernel], Facts]:
    """The kernels of a source's attention, that of many queries last."""
    built = of_text(source)
    graph = built.passed()
    groups = join(graph, partition(graph), JOINS).groups
    (group,) = (g for g in groups if g.kind == "attention")
    made = [
        finish(draft.low, draft.forms).kernel for draft in drafts(graph, group, Sites(), ["sm_80"])
    ]
    return made, graph.facts


CAUSAL = """import nn

pipeline p(q: f32[B, 2, T, 32], k: f32[B, 2, S, 32], v: f32[B, 2, S, 40]) -> f32[B, 2, T, 40]
where B in 0..=8, T in 0..=999, S in 0..=999:
    nn.attend(q, k, v, causal=True)
"""


GROUPED = CAUSAL.replace("q: f32[B, 2", "q: f32[B, 6")
GROUPED = GROUPED.replace("-> f32[B, 2", "-> f32[B, 6")


@pytest.mark.parametrize("source", [CAUSAL, GROUPED, COMPUTED])
def test_its_kernels_are_verified_for_all_sizes_and_read_back(source: str) -> None:
    kernels, facts = attention_kernels(source)
    assert len(kernels) == 3
    for kernel in kernels:
        text = print_kernel(kernel)
        assert print_kernel(parse_kernel(text)) == text  # a NaN equals nothing
        assert verify_kernel(kernel, facts).open == []


@pytest.mark.parametrize("which", [0, 2])
def test_a_wrong_kernel_is_found(which: int) -> None:
    kernels, facts = attention_kernels(CAUSAL)
    kernel = kernels[which]
    at = next(n for n, s in enumerate(kernel.body) if isinstance(s, Attend))
    right = kernel.body[at]
    assert isinstance(right, Attend)
    wrong = {
        2: replace(right, score=Local("other", F32)),
        3: replace(right, score=right.keep),
        6: replace(right, hi=right.hi + 1, extent=None),
        7: replace(right, mr=right.mr - 1),
        -7: replace(right, hi=right.hi + 1, extent=right.hi),
    }
    for number, statement in wrong.items():
        invariant = abs(number)
        body = (*kernel.body[:at], statement, *kernel.body[at + 1 :])
        with pytest.raises(VerifyError) as error:
            verify_kernel(replace(kernel, body=body), facts)
        assert error.value.invariant == invariant


@pytest.mark.parametrize(
    "body",
    [
        PLAIN.replace("sum(e", "sum(s"),
        PLAIN.replace("max(s", "min(s"),
        PLAIN.replace("exp(s", "exp(s * 2.0"),
        "    c = s - mean(s, axis=-1, keepdims=True)\n    nn.softmax(c) @ v\n",
    ],
    ids=["another sum", "another maximum", "another score", "rows of the mean"],
)
def test_what_is_no_softmax_is_left_alone(body: str) -> None:
    graph = of_text("import nn\n" + HEAD.format(more="") + RANGES + SCORES + body).passed()
    assert all(g.kind != "attention" for g in join(graph, partition(graph), JOINS).groups)


def test_sizes_without_limits_need_no_spills(tmp_path: Path) -> None:
    """Where tiles are counted in 64 bits, threads that copy have more registers."""
    text = """import nn

pipeline p(q: f16[B, H, T, 128], k: f16[B, H, T, 128], v: f16[B, H, T, 128]) -> f16[B, H, T, 128]:
    near[i in 0..T, j in 0..T] = i >= j and i - j < 128
    nn.attend(q, k, v, mask=near)
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    assert not any(x.report["spill bytes"] for x in launches(plan))
    assert "setmaxnreg.dec.sync.aligned.u32 56;" in plan.ptx["sm_90a"]


@pytest.mark.parametrize("t, s, d", [(5, 7, 6), (20, 40, 3), (33, 1, 50)])
def test_heads_of_a_size_that_varies(t: int, s: int, d: int, rng: np.random.Generator) -> None:
    """Lanes make the scores, of which tensor cores read whole fragments, beyond the last too."""
    text = """
import nn

pipeline p(q: f32[B, T, D], k: f32[B, S, D]) -> f32[B, T, D]
where T in 1..=64, S in 1..=48, D in 1..=64:
    nn.softmax(q @ transpose(k, [0, 2, 1])) @ k
"""
    q, k = (rng.standard_normal((2, n, d), np.float32) for n in (t, s))
    found = sf.compile(text, target="sm_80", device="emulator")(q=q, k=k)
    scores = q.astype(float) @ k.swapaxes(1, 2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ k
    scale = (abs(q) @ abs(k).swapaxes(1, 2)).max() + abs(k).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=64 * 2.0**-24 * scale)
