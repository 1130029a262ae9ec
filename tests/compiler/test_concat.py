"""Concatenations: a loop for each part, along any axis, between any operations and views."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.kernel_ir import Op
from stagefuse.compiler.kernel_text import values_of
from stagefuse.compiler.kernel_verify import verify_kernel
from stagefuse.compiler.lower import Sites, lower
from stagefuse.compiler.schedule import CPU
from stagefuse.dsl.dims import as_expr, sym
from stagefuse.dsl.dtypes import F32
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS
from .graph_run import graph_of
from .ir_cases import of_text


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parts_have_loops_of_their_own(
    axis: int, level: str, chance: random.Random, rng: np.random.Generator, tmp_path: Path
) -> None:
    other = [chance.randrange(1, 20) for _ in range(3)]
    first, last = ([str(n) for n in other] for _ in range(2))
    first[axis], last[axis] = "N", "M"
    whole = [str(n) for n in other]
    whole[axis] = "N + M + 1"
    one = [str(n) for n in other]
    one[axis] = "1"
    (tmp_path / "p.pipe").write_text(f"""
pipeline p(x: f32[{", ".join(first)}], y: f32[{", ".join(one)}], z: f32[{", ".join(last)}])
-> f32[{", ".join(whole)}]:
    maximum(concat([x * 2.0, y, z - 1.0], axis={axis}), 0.25)
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    for n, m in [(0, 0), (0, 5), (1, 1), (17, 0), tuple(int(i) for i in rng.integers(0, 70, 2))]:
        arrays = []
        for size in (n, 1, m):
            shape = [*other[:axis], size, *other[axis + 1 :]]
            arrays.append(rng.standard_normal(shape, np.float32))
        x, y, z = arrays
        want = np.maximum(np.concatenate([x * 2, y, z - 1], axis), np.float32(0.25))
        np.testing.assert_array_equal(pipe(x=x, y=y, z=z), want)


def test_no_element_is_chosen_among_parts() -> None:
    b = Builder(Facts().with_ranges({"B": (0, 8)}))
    x, y = (b.input(name, TensorType(F32, (sym("B"), as_expr(33)))) for name in "xy")
    columns = [b.view(v, (sym("B"), 33, 1), lambda *at: at[:2]) for v in (x, b.map("add", x, y))]
    graph = graph_of(b, [b.concat(columns, 2), b.concat([y, x], 1), b.concat([y, x], 0)])
    for group in join(graph, partition(graph)).groups:
        kernel = lower(graph, group, Sites(), CPU).kernel
        assert verify_kernel(kernel, graph.facts).open == []
        values = [v for s in walk(kernel.body) for value in values_of(s) for v in post_order(value)]
        assert values and "select" not in {v.fn for v in values if isinstance(v, Op)}


@pytest.mark.parametrize("level", LEVELS)
def test_steps_of_a_long_axis_begin_beyond_some_parts(
    level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "p.pipe").write_text("""
pipeline p(x: f32[N], y: f32[M]) -> f32[2 * N + M]:
    concat([x, y, x * 2.0])
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    for n, m in [(3, 12289), (5000, 3), (4096, 4096), (0, 9001), (1, 0)]:
        x, y = rng.standard_normal(n, np.float32), rng.standard_normal(m, np.float32)
        np.testing.assert_array_equal(pipe(x=x, y=y), np.concatenate([x, y, x * 2]))


@pytest.mark.parametrize("text, shape, pads", [
    ("pad(concat([x, x]), [(0, 3), (0, 0)])", "2*N + 3, 4", [(0, 3), (0, 0)]),
    ("pad(concat([x, x]), [(0, 0), (0, 1)])", "2*N, 5", [(0, 0), (0, 1)]),
    ("pad(concat([x, x]), [(2, 1), (1, 2)])", "2*N + 3, 7", [(2, 1), (1, 2)]),
    ("pad(concat([x, x]), [(0, 2), (0, 1)])[:2*N + 1, :4]", "2*N + 1, 4", [(0, 1), (0, 0)]),
])  # fmt: skip
def test_what_is_longer_than_its_concatenation(
    text: str, shape: str, pads: list[tuple[int, int]], rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "p.pipe").write_text(f"pipeline p(x: f32[N, 4]) -> f32[{shape}]:\n    {text} * 2\n")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe"), threads=1)
    for n in (0, 1, 70):
        x = rng.standard_normal((n, 4), np.float32)
        wanted = np.pad(np.concatenate([x, x]), pads) * 2
        found = np.full(wanted.shape, np.nan, np.float32)
        pipe(x=x, out=found)
        np.testing.assert_array_equal(found, wanted)


def test_what_may_be_shorter_than_parts_of_one_element(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "p.pipe").write_text("""
pipeline p(x: f32[B, N]) -> (f32[B, N], f32[N, B], f32[B, min(N, 2)]):
    a = concat([zeros([B, 1]), x * 2.0], axis=1)[:, :N]
    b = concat([x, zeros([B, 1]), ones([B, 1])], axis=1)[:, 2:]
    c = concat([zeros([B, 1]), ones([B, 1]), x], axis=1)[:, : min(N, 2)]
    a, transpose(concat([x, b], axis=0)[B:] + 1.0), c
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe"), threads=1)
    for n in (0, 1, 2, 3, 35):
        x = rng.standard_normal((3, n), np.float32)
        a, b, c = pipe(x=x)
        np.testing.assert_array_equal(a, np.pad(x * 2, [(0, 0), (1, 0)])[:, :n])
        tail = np.concatenate([x, np.zeros((3, 1)), np.ones((3, 1))], 1)[:, 2:]
        np.testing.assert_array_equal(b, (tail + 1).astype(np.float32).T)
        np.testing.assert_array_equal(c, np.broadcast_to([0, 1], (3, 2))[:, :n])


def test_parts_between_positions_that_are_sizes(rng: np.random.Generator, tmp_path: Path) -> None:
    (tmp_path / "p.pipe").write_text("""
const K = 2
pipeline p(x: f32[B, N], k: f32[M]) -> (f32[B, N - N // 2], f32[N - M], f32[B, N - 3])
where N >= 5, M <= 4, B >= 1:
    a, b = split(x * 2.0, [N // 2], axis=1)
    c, d = split(x[-1], [M])
    e, f, g = split(x, [K, -1], axis=1)
    b, d, f
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe"), threads=1)
    for n, m in [(5, 0), (6, 4), (33, 1)]:
        x = rng.standard_normal((3, n), np.float32)
        found = pipe(x=x, k=np.zeros(m, np.float32))
        for got, want in zip(found, (x[:, n // 2 :] * 2, x[-1, m:], x[:, 2:-1]), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("kind", "result"), [("N", "66*N"), ("N, 3", "66*N, 3"), ("3, N", "3, 66*N")]
)
def test_many_parts(
    kind: str, result: str, level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    axis, factors = kind.split(", ").index("N"), np.arange(66, dtype=np.float32)
    parts = ", ".join(f"x * {n}.0" for n in range(66))
    (tmp_path / "p.pipe").write_text(
        f"pipeline p(x: f32[{kind}]) -> f32[{result}]:\n    concat([{parts}], axis={axis})\n"
    )
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    for n in (0, 1, 15, 17, 64, 131):
        x = rng.standard_normal([n if size == "N" else 3 for size in kind.split(", ")], np.float32)
        np.testing.assert_array_equal(pipe(x=x), np.concatenate([x * f for f in factors], axis))


def test_each_of_very_many_parts_has_a_loop(rng: np.random.Generator, tmp_path: Path) -> None:
    inputs = ", ".join(f"x{n}: f32[A, {n % 3 + 1}]" for n in range(150))
    parts = ", ".join(f"x{n}" for n in range(150))
    text = f"pipeline p({inputs}):\n    concat([{parts}], axis=1) + 1.0\n"
    graph = of_text(text).passed()
    (group,) = join(graph, partition(graph)).groups
    kernel = lower(graph, group, Sites(), CPU).kernel
    values = [v for s in walk(kernel.body) for value in values_of(s) for v in post_order(value)]
    assert values and "select" not in {v.fn for v in values if isinstance(v, Op)}
    source = tmp_path / "p.pipe"
    source.write_text(text)
    pipe = CpuPipeline(compile_file(source, levels=("v3",)), threads=1)
    given = {f"x{n}": rng.standard_normal((3, n % 3 + 1), np.float32) for n in range(150)}
    np.testing.assert_array_equal(pipe(**given), np.concatenate([*given.values()], 1) + 1)
