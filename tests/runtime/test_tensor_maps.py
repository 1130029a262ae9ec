"""Tensor maps of launches: made for the memory at hand, and refused where a plan is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.errors import PlanError
from stagefuse.compiler.plan import Plan
from stagefuse.compiler.plan_check import check
from stagefuse.compiler.plan_file import read, write
from stagefuse.runtime.device_prepared import DevicePreparer
from stagefuse.runtime.devices import open_plan

from .cuda_run import read as on_host
from .fake_cuda import FakeCuda

SOURCE = """
pipeline product(x: bf16[B, 72], w: bf16[72, 40]) -> bf16[B, 40]
where B in 0..=4096:
    x @ w
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("maps") / "product.pipe"
    path.write_text(SOURCE)
    return replace(compile_file(path, targets=["h100"]), cubins={})


def operands(rng: np.random.Generator, rows: int) -> tuple[np.ndarray[Any, Any], ...]:
    found = rng.standard_normal((rows, 72)), rng.standard_normal((72, 40))
    return tuple(a.astype(ml_dtypes.bfloat16) for a in found)


def agrees(y: Any, x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> None:
    wide = x.astype(float) @ w.astype(float)
    np.testing.assert_allclose(np.asarray(y).astype(float), wide, rtol=2**-8, atol=1e-3)


def test_maps_follow_the_callers_memory(
    plan: Plan, cuda: FakeCuda, rng: np.random.Generator
) -> None:
    with open_plan(plan, None, "cuda:0") as pipe:
        x, w = operands(rng, 5)
        agrees(pipe(x=x, w=w), x, w)
        agrees(pipe(x=x[::-1], w=w), x[::-1], w)
        for _ in range(3):
            x, w = operands(rng, 5)
            agrees(on_host(pipe(x=cuda.tensor(x), w=cuda.tensor(w))), x, w)
        assert cuda.counts["graph"] == 1 and cuda.counts["update"] == 3
        empty = pipe(x=x[:0], w=w)
        assert empty.shape == (0, 40)


def test_rows_are_read_where_they_lie_if_they_are_whole(
    cuda: FakeCuda, rng: np.random.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "product.pipe"
    path.write_text(
        "pipeline product(x: bf16[B, K], w: bf16[40, K]) -> bf16[B, 40]\n"
        "where B in 0..=4096:\n    x @ transpose(w, [1, 0])\n"
    )
    plan = replace(compile_file(path, targets=["h100"]), cubins={})
    with open_plan(plan, None, "cuda:0") as pipe:
        for depth in (72, 71, 72):
            for _ in range(2):
                x, w = (rng.standard_normal((n, depth)).astype(ml_dtypes.bfloat16) for n in (5, 40))
                agrees(pipe(x=x, w=w), x, w.T)
                agrees(on_host(pipe(x=cuda.tensor(x), w=cuda.tensor(w))), x, w.T)
        assert {len(g.nodes) for g in cuda.graphs} == {1, 3}


def test_memory_that_is_not_aligned_is_copied(
    plan: Plan, cuda: FakeCuda, rng: np.random.Generator
) -> None:
    with open_plan(plan, None, "cuda:0") as pipe:
        x, w = operands(rng, 5)
        shifted = np.concatenate([x.reshape(-1)[:1], x.reshape(-1)])
        tensor = cuda.tensor(shifted)
        tensor.address += 2
        tensor.shape = x.shape
        agrees(on_host(pipe(x=tensor, w=cuda.tensor(w))), x, w)


def test_the_emulator_runs_them(plan: Plan, rng: np.random.Generator, tmp_path: Path) -> None:
    write(plan, tmp_path / "product.fused")
    assert read(tmp_path / "product.fused").pipelines == plan.pipelines
    with sf.load(tmp_path / "product.fused", device="emulator") as pipe:
        for rows in (1, 129):
            x, w = operands(rng, rows)
            agrees(pipe(x=x, w=w), x, w)


PIXELS: dict[str, Any] = dict(
    sizes=("1", "2", "3", "64"), strides=("384", "192", "64"), box=(128, 64), lower=(-1, -1),
    upper=(-1, -1), steps=(1, 1, 2, 1),
)  # fmt: skip


def changed(plan: Plan, **changes: Any) -> Plan:
    """The plan with another first map; `arch` changes that of the launch."""
    (pipeline,) = plan.pipelines
    (gpu,) = pipeline.gpu
    launch = gpu.launches[-1]
    maps = (replace(launch.maps[0], **changes), *launch.maps[1:])
    gpu = replace(gpu, launches=(*gpu.launches[:-1], replace(launch, maps=maps)))
    return replace(plan, pipelines=(replace(pipeline, gpu=(gpu,)),))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"buffer": 9}, "which the launch does not use"),
        ({"sizes": ("B", "Q")}, "unknown dim 'Q'"),
        ({"strides": ("72", "72")}, "2 strides"),
        ({"box": (128, 0)}, "boxes of"),
        ({"box": (512, 64)}, "boxes of"),
        ({"box": (128, 12)}, "boxes of"),
        ({"swizzle": 64}, r"rows of \d+ bytes, swizzled in 64"),
        ({"swizzle": 48}, "swizzled in 48"),
        ({"steps": (1, 1)}, "has corners"),
        ({**PIXELS, "upper": (0,)}, "has corners"),
        ({**PIXELS, "upper": (0, -129)}, "has corners"),
        ({**PIXELS, "steps": (1, 9, 1, 1)}, "in steps of"),
        ({**PIXELS, "box": (1025, 64)}, "boxes of"),
    ],
)
def test_a_map_that_can_not_be_is_refused(plan: Plan, changes: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        check(changed(plan, **changes))


def test_a_map_of_pixels_is_read_back(plan: Plan, tmp_path: Path) -> None:
    made = changed(plan, **PIXELS)
    check(made)
    write(made, tmp_path / "pixels.fused")
    assert read(tmp_path / "pixels.fused").pipelines == made.pipelines


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": ("B + 1", "72")}, "beyond the buffer"),
        ({"offset": "8"}, "beyond the buffer"),
        ({"offset": "-8"}, "beyond the buffer"),
        ({"strides": ("-72",)}, "beyond the buffer"),
        ({"sizes": ("2", "2"), "strides": ("9",)}, "multiples of 16 bytes"),
        ({"sizes": ("2", "2"), "offset": "4"}, "multiples of 16 bytes"),
    ],
)
def test_a_map_beyond_its_buffer_is_refused(plan: Plan, changes: Any, said: str) -> None:
    (pipeline,) = changed(plan, **changes).pipelines
    with pytest.raises(PlanError, match=said):
        DevicePreparer(pipeline, pipeline.gpu[0]).prepare({"B": 3})


def test_rows_that_coordinates_do_not_reach_are_refused(plan: Plan) -> None:
    (pipeline,) = plan.pipelines
    DevicePreparer(pipeline, pipeline.gpu[0]).prepare({"B": 2**31})
    with pytest.raises(PlanError, match="more than a map can have"):
        DevicePreparer(pipeline, pipeline.gpu[0]).prepare({"B": 2**31 + 1})


def test_blocks_that_stay_are_as_many_as_there_is_room_for(plan: Plan) -> None:
    (pipeline,) = plan.pipelines
    (gpu,) = pipeline.gpu
    assert [n.stays for n in gpu.launches] == [bool(n.maps) for n in gpu.launches]

    def blocks(multiprocessors: int | None) -> list[int]:
        prepared = DevicePreparer(pipeline, gpu, multiprocessors).prepare({"B": 4096})
        return [n.grid[0] for n in prepared.launches if n.plan.stays]

    assert blocks(None) == blocks(132) == [32]
    assert (blocks(7), blocks(1)) == ([6], [2])  # two are a cluster


def test_entries_and_launches_have_as_many_maps(plan: Plan) -> None:
    (pipeline,) = plan.pipelines
    (gpu,) = pipeline.gpu
    less = [replace(n, maps=n.maps[1:]) for n in gpu.launches]
    broken = replace(pipeline, gpu=(replace(gpu, launches=tuple(less)),))
    with pytest.raises(PlanError, match="tensor maps"):
        check(replace(plan, pipelines=(broken,)))
