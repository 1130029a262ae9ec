"""Attention over keys and values that are stored in fewer bits, in the emulator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler.errors import VerifyError
from stagefuse.compiler.kernel_ir import COMPUTED, Attend
from stagefuse.compiler.kernel_text import parse_kernel, print_kernel
from stagefuse.compiler.kernel_verify import verify_kernel
from stagefuse.compiler.plan import Plan
from stagefuse.dsl.dims_text import parse

from .gpu_run import Emulated, check_legal, compiled, launches
from .test_attention_emulated import DTYPES, Case, attention_kernels, expected

F8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Codes:
    """How keys and values are stored: `wide` elements in one, what else is given, the lines that
    make `kk` and `vv` of it, and what a program rounds them to besides."""

    stored: str
    more: str
    lines: str
    wide: int = 1
    rounds: str = ""


BY_TOKEN = Codes(
    "i8",
    ", ks: {e}[B, {g}, S], vs: {e}[B, {g}, S]",
    "    kk = {e}(k) * ks[..., None]\n    vv = {e}(v) * vs[..., None]\n",
)
BY_CHANNEL = Codes(
    "u8",
    ", ks: {e}[{g}, {d}], kz: {e}[{g}, {d}], vs: {e}[{g}, {d}]",
    "    kk = ({e}(k) - kz[:, None, :]) * ks[:, None, :]\n    vv = {e}(v) * vs[:, None, :]\n",
)
PLAIN = Codes("f8e4m3", "", "    kk = {e}(k)\n    vv = {e}(v)\n")
HALVES = Codes("f16", "", "    kk = {e}(k)\n    vv = {e}(v)\n")
ROUNDED = Codes(
    "i8",
    ", ks: {e}[B, {g}, S], vs: {e}[B, {g}, S]",
    "    kk = f32(bf16(f32(k) * ks[..., None]))\n    vv = f32(bf16(f32(v) * vs[..., None]))\n",
    rounds="bf16",
)
NIBBLES = Codes(
    "u8",
    ", vs: {e}[B, {g}, S]",
    "    kk[b, g, s, d in 0..{d}] = {e}((i32(k[b, g, s, d // 2]) >> i32(d % 2 * 4)) & 15)\n"
    "    vv[b, g, s, d in 0..{d}] = "
    "{e}((i32(v[b, g, s, d // 2]) >> i32(d % 2 * 4)) & 15) * vs[b, g, s]\n",
    2,
)


def source(case: Case, codes: Codes, rows: str = "1..=4096") -> str:
    _, heads, groups, _, _ = case.sizes
    e, stored = case.dtype, f"{codes.stored}[B, {groups}, S, {case.head // codes.wide}]"
    given = ", causal=True" if "causal" in case.mask else ""
    names = {"e": e, "g": groups, "d": case.head}
    more, lines = (text.format(**names) for text in (codes.more, codes.lines))
    return f"""import nn

pipeline p(q: {e}[B, {heads}, T, {case.head}], k: {stored}, v: {stored}{more})
    -> {e}[B, {heads}, T, {case.head}]
where B in 0..=8, T in {rows}, S in 0..=4096:
{lines}    nn.attend(q, kk, vv{given})
"""


def arrays(case: Case, codes: Codes, rng: np.random.Generator) -> tuple[dict[str, Any], Any, Any]:
    """What is given, and the keys and values that it means: no product of them is rounded twice."""
    b, h, g, t, s = case.sizes
    dtype, shape = DTYPES[case.dtype], (b, g, s, case.head)
    found: dict[str, Any] = {"q": rng.standard_normal((b, h, t, case.head)).astype(dtype)}
    means: list[Any] = []
    for name in "kv":
        if codes.stored.startswith("f"):
            kind = F8 if codes is PLAIN else np.dtype(np.float16)
            found[name] = rng.standard_normal(shape).astype(kind)
            means.append(found[name].astype(np.float64))
            continue
        low, high = (-128, 128) if codes.stored == "i8" else (0, 256 if codes.wide == 1 else 16)
        value = rng.integers(low, high, shape)
        stored = value if codes.wide == 1 else value[..., ::2] | value[..., 1::2] << 4
        found[name] = stored.astype(codes.stored.replace("u8", "uint8").replace("i8", "int8"))
        value = value.astype(np.float64)
        for part, own in (("z", (g, case.head)), ("s", (b, g, s) if "[B" in codes.more else None)):
            if f" {name}{part}:" not in codes.more:
                continue
            own = own or (g, case.head)
            number = rng.integers(0, 99, own) if part == "z" else rng.uniform(0.001, 0.02, own)
            found[name + part] = number.astype(dtype)
            number = found[name + part].astype(np.float64)
            number = number[:, None, :] if len(own) == 2 else number[..., None]
            value = value - number if part == "z" else value * number
        value = value.astype(np.float32).astype(DTYPES[codes.rounds or case.dtype])
        means.append(value.astype(np.float64))
    return found, means[0], means[1]


def check(case: Case, codes: Codes, plan: Plan, rng: np.random.Generator) -> None:
    inputs, k, v = arrays(case, codes, rng)
    b, _, _, t, s = case.sizes
    (found,) = Emulated(plan, case.arch)(inputs, {"B": b, "T": t, "S": s})
    wanted, lost = expected(case, {"q": inputs["q"], "k": k, "v": v})
    off = abs(found.astype(np.float64) - wanted) - lost
    assert off.size == 0 or off.max() <= 0, (case, off.max())


def stored_keys(plan: Plan) -> list[str]:
    """The kernels that store keys or values."""
    return [x.kernel for x in launches(plan) if "matmul" not in x.kernel]


CASES = [
    (Case("bf16", (1, 4, 2, 2, 579), 32, 32, "causal", "sm_90a"), BY_TOKEN),
    (Case("f16", (1, 2, 1, 1, 75), 128, 128, "", "sm_80"), BY_TOKEN),
    (Case("f32", (1, 2, 2, 3, 90), 16, 16, "causal", "sm_89"), BY_TOKEN),
    (Case("f32", (1, 2, 1, 1, 45), 32, 32, "", "sm_90a"), ROUNDED),
    (Case("f16", (1, 2, 1, 2, 130), 40, 40, "", "sm_90a"), BY_CHANNEL),
    (Case("bf16", (2, 2, 1, 1, 70), 16, 16, "causal", "sm_90a"), PLAIN),
    (Case("f32", (1, 2, 1, 2, 33), 24, 24, "", "sm_80"), HALVES),
    (Case("f16", (1, 2, 1, 1, 77), 32, 32, "", "sm_90a"), NIBBLES),
    (Case("bf16", (1, 2, 2, 1, 0), 16, 16), BY_TOKEN),
    (Case("bf16", (1, 2, 1, 2, 70), 256, 256, "causal", "sm_90a"), BY_CHANNEL),
    (Case("f16", (1, 2, 2, 1, 75), 256, 256, "", "sm_80"), NIBBLES),
    (Case("f32", (1, 2, 2, 1, 43), 144, 144, "", "sm_89"), BY_TOKEN),
]


@pytest.mark.parametrize("case, codes", CASES, ids=[str(c) for c, _ in CASES])
def test_few_queries_give_what_float64_does(
    case: Case, codes: Codes, tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = compiled(tmp_path / "p.pipe", source(case, codes, "1..=3"), (case.arch,))
    check_legal(plan)
    assert {x.report["spill bytes"] for x in launches(plan)} == {0}
    assert stored_keys(plan) == []
    check(case, codes, plan, rng)


JOINED = """import nn

pipeline p(q: {e}[B, {h}, T, {d}], k: {e}[B, {g}, S, {d}], v: {e}[B, {g}, S, {d}],
    kn: {e}[B, {g}, N, {d}], vn: {e}[B, {g}, N, {d}]) -> {e}[B, {h}, T, {d}]
where B in 0..=8, T in 1..=3, S in 0..=4096, N in 1..=9:
    kk = concat([k, {kn}], axis=2)
    vv = concat([v, {vn}], axis=2)
    nn.attend(q, kk, vv{given})
"""
OLD_AND_NEW = [
    (Case("bf16", (1, 4, 2, 2, 259), 128, 128, "causal", "sm_90a"), 1, "kn", "vn"),
    (Case("f16", (2, 2, 1, 1, 75), 40, 40, "", "sm_80"), 9, "kn * 2.0", "-vn"),
    (Case("f32", (1, 2, 2, 3, 90), 24, 24, "causal", "sm_89"), 3, "kn", "vn"),
    (Case("bf16", (1, 2, 2, 1, 1), 16, 16, "", "sm_90a"), 1, "kn", "-vn"),
    (Case("f32", (1, 2, 1, 1, 50), 256, 256, "causal", "sm_80"), 2, "kn * 2.0", "-vn"),
]


@pytest.mark.parametrize("case, new, kn, vn", OLD_AND_NEW, ids=[str(x[0]) for x in OLD_AND_NEW])
def test_a_cache_and_what_is_new_are_read_where_they_lie(
    case: Case, new: int, kn: str, vn: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Of each key by one load, a block ahead of where it is needed."""
    b, h, g, t, s = case.sizes
    given = ", causal=True" if "causal" in case.mask else ""
    text = JOINED.format(e=case.dtype, h=h, g=g, d=case.head, kn=kn, vn=vn, given=given)
    plan = compiled(tmp_path / "p.pipe", text, (case.arch,))
    check_legal(plan)
    assert {x.report["spill bytes"] for x in launches(plan)} == {0}
    assert stored_keys(plan) == []
    if (kn, vn) == ("kn", "vn"):
        entry = plan.ptx[case.arch].split("_pieces_", 1)[1].split("$keys1:", 1)[1]
        loop = entry.split("bra $keys1", 1)[0]
        assert "ld.global.nc" not in loop.split("mma.sync", 1)[1]
    kind = DTYPES[case.dtype]
    q = rng.standard_normal((b, h, t, case.head)).astype(kind)
    k, v = (rng.standard_normal((b, g, s, case.head)).astype(kind) for _ in "kv")
    inputs = {"q": q, "k": k[:, :, : s - new], "v": v[:, :, : s - new]}
    inputs |= {"kn": k[:, :, s - new :], "vn": v[:, :, s - new :]}
    inputs = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
    (found,) = Emulated(plan, case.arch)(inputs, {"B": b, "T": t, "S": s - new, "N": new})
    means = {"q": q, "k": k.astype(np.float64), "v": v.astype(np.float64)}
    means["k"][:, :, s - new :] *= 2 if "2.0" in kn else 1
    means["v"][:, :, s - new :] *= -1 if "-" in vn else 1
    wanted, lost = expected(case, means)
    assert np.all(abs(found.astype(np.float64) - wanted) <= lost)


def test_the_sizes_of_a_call_say_whether_keys_are_stored(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    case = Case("bf16", (1, 2, 1, 3, 530), 64, 64, "", "sm_90a")
    plan = compiled(tmp_path / "p.pipe", source(case, BY_TOKEN), (case.arch,))
    for queries, keys, many in ((3, 530, False), (70, 90, True)):
        sizes = {"B": 1, "T": queries, "S": keys}
        run = [x.kernel for x in launches(plan) if parse(x.grid[0]).evaluate(sizes)]
        assert (set(run) >= set(stored_keys(plan))) == many and len(run) == 2 + many
        check(replace(case, sizes=(1, 2, 1, queries, keys)), BY_TOKEN, plan, rng)


def test_nothing_wide_is_stored_for_a_single_query(tmp_path: Path) -> None:
    case = Case("bf16", (1, 8, 2, 1, 1), 128, 128)
    text = source(case, BY_TOKEN).replace("T, 128", "1, 128").replace("T in 1..=4096, ", "")
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80", "sm_90a"))
    for gpu in plan.pipelines[0].gpu:
        sizes = {"B": 1, "S": 4096}
        assert len(gpu.launches) == 2
        assert sum(parse(s).evaluate(sizes) for s in gpu.slots) < 4096 * 2 * 128  # less than keys


def test_wide_keys_are_stored_and_fit_whatever_panels_they_are_in(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    case = Case("f32", (1, 2, 2, 2, 75), 248, 248, "", "sm_89")
    plan = compiled(tmp_path / "p.pipe", source(case, HALVES, "1..=3"), (case.arch,))
    assert len(launches(plan)) == 4
    assert all(x.report["blocks per SM"] > 0 for x in launches(plan))
    check(case, HALVES, plan, rng)


def test_what_else_reads_keys_has_them_stored(tmp_path: Path) -> None:
    case = Case("bf16", (1, 2, 2, 1, 1), 64, 64)
    text = source(case, BY_TOKEN).replace("-> bf16[B, 2, T, 64]", "-> (bf16[B, 2, T, 64], f32)")
    text = text.replace("    nn.attend(q, kk, vv)", "    (nn.attend(q, kk, vv), sum(f32(kk)))")
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    first = next(x for x in launches(plan) if "pieces" in x.kernel)
    names = [plan.pipelines[0].gpu[0].buffers[b].name for b in first.buffers]
    assert "v" in names and "k" not in names


def test_infinite_scales_give_what_numpy_gives(tmp_path: Path, rng: np.random.Generator) -> None:
    case = Case("f32", (1, 1, 1, 2, 75), 16, 16, "", "sm_80")
    plan = compiled(tmp_path / "p.pipe", source(case, BY_TOKEN, "1..=3"), (case.arch,))
    run = Emulated(plan, case.arch)
    for where in ("ks", "vs"):
        inputs, _, _ = arrays(case, BY_TOKEN, rng)
        inputs[where][0, 0, 7] = np.inf
        inputs[where[0]][0, 0, 7] = 3
        (found,) = run(inputs, {"B": 1, "T": 2, "S": 75})
        q, k, v = (inputs[n].astype(np.float64)[0, 0] for n in "qkv")
        k, v = k * inputs["ks"][0, 0, :, None], v * inputs["vs"][0, 0, :, None]
        with np.errstate(invalid="ignore"):
            scores = q @ k.T / 4
            e = np.exp(scores - scores.max(axis=-1, keepdims=True))
            wanted = e / e.sum(axis=-1, keepdims=True) @ v
        np.testing.assert_array_equal(np.isnan(found[0, 0]), np.isnan(wanted))
        np.testing.assert_array_equal(np.isinf(found[0, 0]), np.isinf(wanted))


def test_its_kernels_are_verified_and_read_back() -> None:
    case = Case("bf16", (1, 4, 2, 1, 1), 64, 64, "causal")
    kernels, facts = attention_kernels(source(case, BY_TOKEN))
    pieces = kernels[0]
    text = print_kernel(pieces)
    assert print_kernel(parse_kernel(text)) == text
    assert verify_kernel(pieces, facts).open == []
    at = next(n for n, s in enumerate(pieces.body) if isinstance(s, Attend))
    right = pieces.body[at]
    assert isinstance(right, Attend) and right.keys == right.values == COMPUTED
    for wrong in (
        replace(right, key_element=None),
        replace(right, keys=right.queries),
        replace(right, hi=right.hi + 1, extent=None),
        replace(right, depth=right.depth + 1),
    ):
        body = (*pieces.body[:at], wrong, *pieces.body[at + 1 :])
        with pytest.raises(VerifyError):
            verify_kernel(replace(pieces, body=body), facts)
