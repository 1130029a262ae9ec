"""Groups of one form have one kernel, which is what each of them would have got alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.fusion import alike
from stagefuse.compiler.gpu import modules
from stagefuse.compiler.gpu.assemble import AssemblerMissing
from stagefuse.compiler.plan import Plan

LAYERS, WIDTH, HIDDEN, EXPERTS = 3, 32, 48, 4
SOURCE = f"""
import nn

weights w = "w.npz"

pipeline layered(x: X, ids: i64[B, T], pick: i64[B]) -> (x: X, best: i64[B, T])
where B in 1..=4, T in 1..=24:
    state kept: f32[{LAYERS}, 2, {WIDTH}] = 0.0
    best = ids
    for i in 0..{LAYERS}:
        p = w.layers[i]
        h = nn.layer_norm(x, p.norm)
        q = nn.split_heads(nn.linear(h, p.query), 2)
        k = nn.split_heads(nn.linear(h, p.key), 2)
        v = nn.split_heads(nn.linear(h, p.value), 2)
        x = x + nn.merge_heads(nn.attend(q, k, v, mask=(ids != 0)[:, None, None, :]))
        x = x + nn.linear(nn.gelu(nn.linear(h, p.up)), p.down)
        x = x + f32(bf16(h) @ transpose(bf16(p.query.weight), [1, 0]))
        bytes = i8(clamp(h * 20.0, -90.0, 90.0)) @ i8(clamp(p.key.weight * 20.0, -90.0, 90.0))
        x = x + f32(bytes) / 400.0
        x = x + transpose(nn.conv1d(transpose(h, [0, 2, 1]), p.near, padding=1), [0, 2, 1])
        chances = nn.softmax(h @ p.gate.weight)
        values, which = topk(chances, 2)
        x = x + p.table.weight[which[:, :, 0]] * values[:, :, 0:1]
        x = x + p.table.weight[clamp(best, 0, {EXPERTS - 1})]
            + p.table.weight[ids]
        best = argmax(chances, axis=-1)
        x = x + cumsum(h, axis=1) * kept[i, 0] + kept[i, 1][pick][:, None, None]
        kept[i, 0] = x[0, 0]
        kept[i, 1] = maximum(x[0, 0], 0.0)
    x, best
"""


def weights(rng: np.random.Generator) -> dict[str, Any]:
    shapes = {
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "up.weight": (HIDDEN, WIDTH),
        "up.bias": (HIDDEN,), "down.weight": (WIDTH, HIDDEN), "down.bias": (WIDTH,),
        "gate.weight": (WIDTH, EXPERTS), "near.weight": (WIDTH, WIDTH, 3), "near.bias": (WIDTH,),
        "table.weight": (EXPERTS, WIDTH),
        **{f"{n}.weight": (WIDTH, WIDTH) for n in ("query", "key", "value")},
    }  # fmt: skip
    return {
        f"layers.{layer}.{name}": rng.standard_normal(shape).astype(np.float32)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }


def plan_of(path: Path, given: dict[str, Any]) -> Plan:
    targets = ("cpu", "a100", "h200")
    return compile_file(path, targets=targets, levels=(), weights={"w": given}, verify=False)


def no_assembler(*_: Any) -> Any:
    raise AssemblerMissing


def test_each_group_has_the_kernel_that_it_would_have_alone(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, given, lowered = tmp_path / "layered.pipe", weights(rng), list[bool]()
    path.write_text(SOURCE.replace("X", f"f32[B, T, {WIDTH}]"))
    of = alike.Copies.of

    def counted(copies: Any, graph: Any, group: Any) -> Any:
        found = of(copies, graph, group)
        lowered.append(not found.made)
        return found

    def alone(copies: Any, graph: Any, group: Any) -> Any:
        copies.kept.clear()
        return of(copies, graph, group)

    monkeypatch.setattr(modules, "Assembly", no_assembler)
    monkeypatch.setattr(alike.Copies, "of", counted)
    plan = plan_of(path, given)
    assert lowered.count(True) < 0.7 * len(lowered)
    monkeypatch.setattr(alike.Copies, "of", alone)
    expected = plan_of(path, given)
    assert plan.ptx == expected.ptx
    for found, wanted in zip(plan.pipelines, expected.pipelines, strict=True):
        assert found.steps == wanted.steps and found.buffers == wanted.buffers
        for one, other in zip(found.gpu, wanted.gpu, strict=True):
            assert one.launches == other.launches and one.buffers == other.buffers
        assert found == wanted
