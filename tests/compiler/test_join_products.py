"""Layers of one input become one layer; equal layers of a model share their kernels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler import driver
from stagefuse.compiler.graph import Concat, Contract, Graph
from stagefuse.compiler.passes import pipeline_of
from stagefuse.compiler.passes.join_products import JoinProducts
from stagefuse.compiler.passes.simplify import Simplify
from stagefuse.compiler.run_passes import run_passes
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from ..test_examples import EXAMPLES, MODEL, is_installed
from .ir_cases import Built, of_text

RNG = np.random.default_rng(7)


def layer(name: str, columns: int, depth: int = 32, bias: bool = True) -> dict[str, Any]:
    made = {f"{name}.weight": RNG.standard_normal((columns, depth), np.float32)}
    if bias:
        made[f"{name}.bias"] = RNG.standard_normal(columns, np.float32)
    return made


def program(*calls: str) -> str:
    body = "\n".join(f"    r{n} = {call}" for n, call in enumerate(calls))
    results = ", ".join(f"r{n}" for n in range(len(calls)))
    types = ", ".join(f"r{n}: f32[B, T, {calls[n].rpartition('#')[2]}]" for n in range(len(calls)))
    body = "\n".join(line.partition("#")[0] for line in body.splitlines())
    return (
        'import nn\nweights w = "w.npz"\n'
        f"pipeline p(x: f32[B, T, 32], y: f32[B, T, 32]) -> ({types})\n"
        "where B in 0..=8, T in 0..=64:\n" + body + f"\n    ({results})\n"
    )


def products(graph: Graph) -> int:
    return sum(isinstance(n.primitive, Contract) for n in graph.nodes.values())


QKV = program("nn.linear(x, w.q)#48", "nn.linear(x, w.k)#48", "nn.linear(x, w.v)#96")
QKV_WEIGHTS = {**layer("q", 48), **layer("k", 48), **layer("v", 96)}


def joined(built: Built) -> int:
    """How many products a program has after all passes."""
    return products(built.passed())


def test_layers_of_one_input_become_one() -> None:
    built = of_text(QKV, {"w": QKV_WEIGHTS})
    apart = [p for p in pipeline_of(built.load) if p.name != "join_products"]
    assert products(run_passes(built.graph, apart, built.bounds)[0]) == 3
    assert joined(built) == 1
    assert not any(isinstance(n.primitive, Concat) for n in built.passed().nodes.values())


def test_the_reason_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "qkv.pipe"
    path.write_text(QKV)
    plan = driver.compile_file(path, weights={"w": QKV_WEIGHTS})
    reasons = [r["because"] for s in plan.pipelines[0].steps for r in s.report["reasons"]]
    assert "layers of 48, 48, 96 columns read one input and fill whole panels of 48" in reasons
    apart = QKV.replace("w.v)", "w.u)").replace("96]", "50]")
    built = of_text(apart, {"w": {**QKV_WEIGHTS, **layer("u", 50)}})
    _, runs = run_passes(built.graph, pipeline_of(built.load), built.bounds)
    (run,) = (r for r in runs if r.name == "join_products")
    assert {text for text in run.reasons.values()} == {
        "not joined: layers of 48, 48, 50 columns would cut panels of 32"
    }


def test_layers_without_bias_become_one() -> None:
    text = program("nn.linear(x, w.gate)#64", "nn.linear(x, w.up)#64")
    weights = {**layer("gate", 64, bias=False), **layer("up", 64, bias=False)}
    assert joined(of_text(text, {"w": weights})) == 1


def test_transposed_weights_become_one() -> None:
    text = program("x @ w.a#64", "x @ w.b#64")
    weights = {n: RNG.standard_normal((32, 64), np.float32) for n in "ab"}
    assert joined(of_text(text, {"w": weights})) == 1


@pytest.mark.parametrize(
    ("calls", "weights"),
    [
        (("nn.linear(x, w.a)#48", "nn.linear(y, w.b)#48"), {**layer("a", 48), **layer("b", 48)}),
        (("nn.linear(x, w.a)#50", "nn.linear(x, w.b)#50"), {**layer("a", 50), **layer("b", 50)}),
        (("nn.linear(x, w.a)#48", "nn.linear(x, w.b)#48"),
         {**layer("a", 48), **layer("b", 48, bias=False)}),
        (("nn.linear(x, w.a)#48", "nn.linear(x * 2.0, w.b)#48"),
         {**layer("a", 48), **layer("b", 48)}),
    ],
    ids=["inputs", "panels", "bias", "scaled"],
)  # fmt: skip
def test_others_stay_apart(calls: tuple[str, ...], weights: dict[str, Any]) -> None:
    assert joined(of_text(program(*calls), {"w": weights})) == 2


def test_joining_again_changes_nothing() -> None:
    built = of_text(QKV, {"w": QKV_WEIGHTS})
    once = JoinProducts().run(Simplify().run(built.graph))
    again = Simplify().run(once)
    assert JoinProducts().run(again) is again


def test_results_are_those_of_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "qkv.pipe"
    path.write_text(QKV)
    pipe = CpuPipeline(driver.compile_file(path, weights={"w": QKV_WEIGHTS}))
    for batch, tokens in ((1, 1), (2, 7), (0, 3), (3, 40)):
        x = RNG.standard_normal((batch, tokens, 32), np.float32)
        found = pipe(x=x, y=x)
        for got, name in zip(found, ("q", "k", "v"), strict=True):
            weight, bias = QKV_WEIGHTS[f"{name}.weight"], QKV_WEIGHTS[f"{name}.bias"]
            want = x.astype(float) @ weight.T.astype(float) + bias
            np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.skipif(not is_installed(MODEL), reason=f"the package {MODEL} is not installed")
def test_layers_of_a_model_share_their_kernels() -> None:
    """Six equal layers: each kernel of a layer is compiled once and launched six times."""
    from importlib import metadata

    files = metadata.files(MODEL) or []
    path = next(f.locate() for f in files if f.name == "model.safetensors")
    plan = driver.compile_file(EXAMPLES / "minilm.pipe", weights={"w": Path(str(path))})
    symbols = [step.symbol for step in plan.pipelines[0].steps]
    counts = {name: symbols.count(name) for name in symbols}
    in_layers = sum(1 for n in counts.values() if n >= 6)
    assert in_layers >= 5
    assert len(symbols) <= 48
    assert len(counts) <= len(symbols) - 5 * in_layers
