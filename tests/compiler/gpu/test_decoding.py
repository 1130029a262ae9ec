"""Attention of a single query, as a constant: two kernels by pieces of the keys, whatever form it
was written in, each against float64 in the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf

from .gpu_run import Emulated, check_legal, compiled, launches

DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16),
          "bf16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
"""Half the distance of numbers from 1 on: the most that rounding loses."""


@dataclass(frozen=True)
class Form:
    """A way to write attention of 8 queries of `head` elements to 4 heads of keys that hold `n`
    tokens, for each of a batch: the types of q, and of k and v, and the body."""

    name: str
    query: str
    keys: str
    body: str
    dtype: str = "f16"
    head: int = 64
    arch: str = "sm_90a"
    near: int = 0  # of the tokens, the only ones that are kept
    slope: float = 0.0  # of a bias

    def shape(self, axes: str, batch: int, length: int) -> tuple[int, ...]:
        sizes = {"B": batch, "S": length}
        names = axes.strip("[").split(", ")
        return (*(sizes.get(n) or int(n) for n in names), self.head)

    def text(self) -> str:
        e, d = self.dtype, f", {self.head}]"
        types = f"q: {e}{self.query}{d}, k: {e}{self.keys}{d}, v: {e}{self.keys}{d}, n: i64[B]"
        body = "".join(f"    {line}\n" for line in self.body.strip().split("\n"))
        head = f"import nn\n\npipeline p({types}) -> {e}{self.query}{d}\n"
        return f"{head}where B in 1..=4, S in 64..=8192:\n{body}"


KEPT = "mask=iota(S) < n[:, None, None, None]"
ATTEND = f"nn.attend(q, k, v, {KEPT})"
REPEATED = """
kr = nn.repeat_heads(k, 2)
vr = nn.repeat_heads(v, 2)
s = q @ transpose(kr, [0, 1, 3, 2]) * 0.125
nn.masked_softmax(s, iota(S) < n[:, None, None, None]) @ vr
"""
BROADCAST = f"""
kr = reshape(broadcast_to(k[:, :, None], [B, 4, 2, S, 64]), [B, 8, S, 64])
vr = reshape(broadcast_to(v[:, :, None], [B, 4, 2, S, 64]), [B, 8, S, 64])
nn.attend(q, kr, vr, {KEPT})
"""
SQUEEZED = """
s[b, h, j] = sum[d] f32(q[b, h, d]) * f32(k[b, h // 2, j, d])
p = nn.masked_softmax(s * 0.125, iota(S) < n[:, None, None])
o[b, h, d] = sum[j] p[b, h, j] * f32(v[b, h // 2, j, d])
f16(o)
"""
TURNED = f"""
kt = transpose(k, [0, 2, 1, 3])
o = nn.attend(transpose(q, [0, 2, 1, 3]), kt, transpose(v, [0, 2, 1, 3]), {KEPT})
transpose(o, [0, 2, 1, 3])
"""
WINDOW = """
at = n[:, None, None, None]
nn.attend(q, k, v, mask=(iota(S) < at) and (iota(S) >= at - 100))
"""
ALIBI = """
b[b, h in 0..8, t in 0..1, j in 0..S] = f32(j - n[b] + 1) * 0.125
s = f32(q) @ transpose(nn.repeat_heads(f32(k), 2), [0, 1, 3, 2]) * 0.125 + b
f16(nn.masked_softmax(s, iota(S) < n[:, None, None, None]) @ nn.repeat_heads(f32(v), 2))
"""
RESHAPED = """
s[b, g, t, j] = sum[d] reshape(q, [B, 4, 2, 64])[b, g, t, d] * k[b, g, j, d]
p = nn.masked_softmax(reshape(s * 0.125, [B, 8, 1, S]), iota(S) < n[:, None, None, None])
o = reshape(p, [B, 4, 2, S]) @ v
reshape(o, [B, 8, 1, 64])
"""
FORMS = [
    Form("reshaped", "[B, 8, 1", "[B, 4, S", RESHAPED, "bf16"),
    Form("reshaped in f32", "[B, 8, 1", "[B, 4, S", RESHAPED, "f32", 64, "sm_80"),
    Form("attend", "[B, 8, 1", "[B, 4, S", ATTEND),
    Form("a100", "[B, 8, 1", "[B, 4, S", ATTEND, "bf16", 128, "sm_80"),
    Form("l40", "[B, 8, 1", "[B, 4, S", ATTEND, "f32", 64, "sm_89"),
    Form("narrow", "[B, 8, 1", "[B, 4, S", ATTEND, "f16", 32, "sm_80"),
    Form("wide", "[B, 8, 1", "[B, 4, S", ATTEND, "bf16", 256),
    Form("odd", "[B, 8, 1", "[B, 4, S", ATTEND, "f16", 80, "sm_89"),
    Form("repeated", "[B, 8, 1", "[B, 4, S", REPEATED),
    Form("broadcast", "[B, 8, 1", "[B, 4, S", BROADCAST, "bf16"),
    Form("squeezed", "[B, 8", "[B, 4, S", SQUEEZED),
    Form("turned", "[B, 1, 8", "[B, S, 4", TURNED, "f32"),
    Form("window", "[B, 8, 1", "[B, 4, S", WINDOW, near=100),
    Form("alibi", "[B, 8, 1", "[B, 4, S", ALIBI, slope=0.125),
]


def expected(form: Form, q: Any, k: Any, v: Any, n: Any) -> tuple[Any, Any]:
    """The results in float64 over [B, 8, D], and what may be lost of each at most: a score loses
    depth + 4 roundings of its terms, and two of its own dtype, as that of a bias; a weight as much
    relatively."""
    heads_last = form.keys == "[B, S, 4"
    q = q.astype(np.float64).reshape(len(n), 8, form.head)
    k, v = (x.astype(np.float64) for x in (k, v))
    k, v = (np.repeat(x.swapaxes(1, 2) if heads_last else x, 2, axis=1) for x in (k, v))
    scale = 0.125 if form.body != ATTEND else form.head**-0.5
    at = np.arange(k.shape[2])
    keep = at < n[:, None]
    if form.near:
        keep = keep & (at >= n[:, None] - form.near)
    bias = (at - n[:, None] + 1) * form.slope
    scores = np.einsum("bhd,bhsd->bhs", q, k) * scale + bias[:, None]
    terms = np.einsum("bhd,bhsd->bhs", abs(q), abs(k)) * scale + abs(bias[:, None])
    scores = np.where(keep[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = weights / weights.sum(axis=-1, keepdims=True)
    unit = UNIT[form.dtype]
    lost = 2 * (form.head + 4) * 2.0**-22 * terms.max(axis=-1, keepdims=True)
    lost = lost + (k.shape[2] + 8) * 2.0**-22 + (2 * unit if form.dtype != "f32" else 0)
    wanted, sizes = (np.einsum("bhs,bhsd->bhd", shares, x) for x in (v, abs(v)))
    return wanted, lost * sizes + unit * 2.0**-6


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_one_query_takes_two_kernels(form: Form, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", form.text(), (form.arch,))
    check_legal(plan)
    made = launches(plan)
    assert [x.label.rpartition(" ")[2] for x in made] == ["pieces", "joined"]
    assert all(x.report.get("spill bytes", 0) == 0 for x in made)
    run = Emulated(plan, form.arch)
    for batch, length in ((1, 513), (2, 70)):
        shapes = [form.shape(types, batch, length) for types in (form.query, form.keys, form.keys)]
        arrays = [rng.standard_normal(s).astype(DTYPES[form.dtype]) for s in shapes]
        n = rng.integers(1, length + 1, batch)
        given = dict(zip("qkvn", (*arrays, n), strict=True))
        (found,) = run(given, {"B": batch, "S": length})
        wanted, lost = expected(form, *arrays, n)
        off = abs(found.astype(np.float64).reshape(wanted.shape) - wanted) - lost
        assert off.max() <= 0, off.max()


CROSS = """import nn

pipeline p(x: f32[B, 1, 512], k: f32[B, 1500, 512], v: f32[B, 1500, 512]) -> f32[B, 1, 512]
where B in 1..=8:
    nn.merge_heads(nn.attend(nn.split_heads(x, 8), nn.split_heads(k, 8), nn.split_heads(v, 8)))
"""


def test_heads_of_a_known_number_of_keys(tmp_path: Path) -> None:
    plan = compiled(tmp_path / "p.pipe", CROSS)
    for gpu in plan.pipelines[0].gpu:
        assert [x.label.rpartition(" ")[2] for x in gpu.launches] == ["pieces", "joined"]


KEPT_HEADS = """import nn

pipeline p(x: f16[1, 1, 64], wq: f16[64, 64], wk: f16[64, 32], wv: f16[64, 32]) -> f16[1, 1, 64]
where S in 64..=4096:
    state keys: f16[2, S, 16] = 0.0
    state values: f16[2, S, 16] = 0.0
    state length: i64 = 0
    at = length + iota(1)
    q = nn.split_heads(x @ wq, 4) |> nn.rope(at)
    k = nn.split_heads(x @ wk, 2) |> nn.rope(at)
    keys[:, length:length + 1] = k[0]
    values[:, length:length + 1] = nn.split_heads(x @ wv, 2)[0]
    length = length + 1
    nn.merge_heads(nn.attend(q, keys[None], values[None], mask=iota(S) < length))
"""


def test_kept_keys_and_values_are_read_in_16_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", KEPT_HEADS, ("sm_80",))
    (gpu,) = plan.pipelines[0].gpu
    wide = [b for b in gpu.buffers if "S" in " ".join(b.shape) and b.role == "temporary"]
    assert all("//" in " ".join(b.shape) for b in wide), wide  # figures of pieces, and no copy
    weights = {n: rng.standard_normal(s).astype(np.float16) / 8 for n, s in
               {"wq": (64, 64), "wk": (64, 32), "wv": (64, 32)}.items()}  # fmt: skip
    cpu = sf.compile(KEPT_HEADS).session(S=520)
    emulated = sf.compile(KEPT_HEADS, target="a100", device="emulator").session(S=520)
    for _ in range(2):
        x = rng.standard_normal((1, 1, 64)).astype(np.float16)
        found, wanted = (np.asarray(s(x=x, **weights)) for s in (emulated, cpu))
        # each engine rounds scores, weights and sums to f16: a few units of values up to 4
        np.testing.assert_allclose(found.astype(float), wanted.astype(float), atol=16 * 2.0**-11)


ONE_HEAD = """import nn

pipeline p(q: f32[64], k: f32[S, 64], v: f32[S, 48]) -> f32[48]
where S in 64..=8192:
    nn.softmax(k @ q * 0.125) @ v
"""


def test_one_head_of_vectors(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", ONE_HEAD, ("sm_80",))
    assert [x.label.rpartition(" ")[2] for x in launches(plan)] == ["pieces", "joined"]
    shapes = {"q": (64,), "k": (300, 64), "v": (300, 48)}
    given = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    (found,) = Emulated(plan, "sm_80")(given, {"S": 300})
    q, k, v = (given[n].astype(np.float64) for n in "qkv")
    e = np.exp(k @ q * 0.125)
    # 68 roundings of scores whose terms sum to at most 20, and 308 of the sums, each of 2^-22
    np.testing.assert_allclose(found, e / e.sum() @ v, rtol=0, atol=(2 * 68 * 20 + 308) * 2.0**-22)


def test_what_joins_pieces_reads_nothing_else(tmp_path: Path) -> None:
    """Its report has the bytes of pieces alone, not those of keys and values."""
    text = """import nn

pipeline p(q: bf16[B, 8, 1, 64], k: bf16[B, 8, S, 64], v: bf16[B, 8, S, 64]) -> bf16[B, 8, 1, 64]
where B in 1..=8, S in 1..=8192:
    nn.attend(q, k, v)
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    pieces, joined = launches(plan)
    assert {0, 1, 2} <= set(pieces.buffers) and not {0, 1, 2} & set(joined.buffers)
    assert "B*S" in pieces.report["bytes"] and "B*S" not in joined.report["bytes"]
