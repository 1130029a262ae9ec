"""Recurrences as one kernel whose blocks stay and wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.gpu.recurrence.dots import MOST_ROWS
from stagefuse.compiler.plan import Plan
from stagefuse.runtime import emulator
from stagefuse.runtime.device_pipeline import DevicePipeline
from stagefuse.runtime.devices import open_plan
from stagefuse.runtime.emulator_driver import EmulatorDriver

from ...runtime.cuda_run import installed
from ...runtime.fake_cuda import FakeCuda
from .gpu_run import ARCHES, check_legal, compiled, launches

Array = Any
H, B = 66, 3
"""Units and sequences: the products of a step are several tiles, of which the last is cut."""


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def lstm(gates: Array, r: Array, n: Array, reverse: bool = False) -> list[Array]:
    y, (h, c) = np.zeros((*gates.shape[:2], len(r[0]))), np.zeros((2, len(n), len(r[0])))
    for t in range(len(gates))[:: -1 if reverse else 1]:
        i, f, g, o = np.split(gates[t] + h @ r.T, 4, axis=1)
        kept = (t < n)[:, None]
        c = np.where(kept, _sigmoid(f) * c + _sigmoid(i) * np.tanh(g), c)
        h = np.where(kept, _sigmoid(o) * np.tanh(c), h)
        y[t] = kept * h
    return [y, h, c]


def both(gates: Array, r: Array, n: Array) -> list[Array]:
    return [lstm(gates, r, n)[0], lstm(gates, r, n, True)[0]]


def gru(gates: Array, r: Array, before: bool = False) -> list[Array]:
    h, y = np.zeros((gates.shape[1], len(r[0]))), np.zeros((*gates.shape[:2], len(r[0])))
    rz, rn = np.split(r, [2 * len(r[0])])
    for t in range(len(gates)):
        xr, xz, xn = np.split(gates[t], 3, axis=1)
        hr, hz = np.split(h @ rz.T, 2, axis=1)
        if before:  # as ONNX has it unless told otherwise: z comes first
            xr, xz, hr, hz = xz, xr, hz, hr
            n = np.tanh(xn + (_sigmoid(xr + hr) * h) @ rn.T)
        else:
            n = np.tanh(xn + _sigmoid(xr + hr) * (h @ rn.T))
        z = _sigmoid(xz + hz)
        h = y[t] = (1 - z) * n + z * h
    return [y, h]


def rnn(gates: Array, r: Array) -> list[Array]:
    h, y = np.zeros(gates.shape[1:]), np.zeros(gates.shape)
    for t in range(len(gates)):
        h = y[t] = np.tanh(gates[t] + h @ r.T)
    return [y, h]


LSTM = f"gates: f32[T, B, {4 * H}], r: f32[{4 * H}, {H}], n: i64[B]"
GRU = f"gates: f32[T, B, {3 * H}], r: f32[{3 * H}, {H}]"
STATES = f"f32[T, B, {H}]"
LAYERS: dict[str, tuple[str, Callable[..., list[Array]]]] = {
    "lstm": (
        f"({LSTM}) -> ({STATES}, f32[B, {H}], f32[B, {H}]):\n"
        "    nn.lstm_steps(gates, r, lengths=n)",
        lstm,
    ),
    "both directions": (
        f"({LSTM}) -> ({STATES}, {STATES}):\n"
        "    there, h, c = nn.lstm_steps(gates, r, lengths=n)\n"
        "    back, h, c = nn.lstm_steps(gates, r, lengths=n, reverse=True)\n"
        "    there, back",
        both,
    ),
    "gru": (f"({GRU}) -> ({STATES}, f32[B, {H}]):\n    nn.gru_steps(gates, r)", gru),
    "gru, reset before": (
        f"({GRU}) -> ({STATES}, f32[B, {H}]):\n"
        f"    onnx.gru(gates, r, zeros([{3 * H}], f32), zeros([B, {H}], f32))",
        lambda gates, r: gru(gates, r, True),
    ),
    "rnn": (
        f"(gates: {STATES}, r: f32[{H}, {H}]) -> ({STATES}, f32[B, {H}]):\n"
        "    nn.rnn_steps(gates, r)",
        rnn,
    ),
}


def source(layer: str, where: str = "where T in 0..=512, B in 0..=16") -> str:
    head, body = LAYERS[layer][0].split(":\n", 1)
    return f"import nn\nimport onnx\n\npipeline layer{head}\n{where}:\n{body}\n"


def arrays(steps: int, rows: int, gates: int, rng: np.random.Generator) -> dict[str, Array]:
    return {
        "gates": rng.standard_normal((steps, rows, gates)).astype(np.float32),
        "r": (0.3 * rng.standard_normal((gates, H))).astype(np.float32),
        "n": rng.integers(0, steps + 1, rows),
    }


def steps_of(plan: Plan) -> list[Any]:
    """The launches that are recurrences."""
    return [x for x in launches(plan) if any("one kernel" in said for said in because(x))]


def because(launch: Any) -> list[str]:
    """What is said of the recurrence that a launch is, or is part of."""
    reasons = launch.report.get("reasons", [])
    return [r["because"] for r in reasons if r["node"] == "recurrence"]


def compare(pipe: Any, layer: str, steps: int, rows: int, rng: np.random.Generator) -> None:
    given = arrays(steps, rows, {"g": 3, "r": 1}.get(layer[0], 4) * H, rng)
    if "n:" not in LAYERS[layer][0]:
        del given["n"]
    wanted = LAYERS[layer][1](*(v.astype(float) if v.ndim > 1 else v for v in given.values()))
    for found, expected in zip(pipe(**given), wanted, strict=True):
        # products of 66 elements in f32 at a few steps
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "arches"),
    [
        ("lstm", tuple(ARCHES)), ("both directions", ("sm_80",)), ("gru", ("sm_89",)),
        ("gru, reset before", ("sm_90a",)), ("rnn", ("sm_80",)),
    ],
)  # fmt: skip
def test_layers_are_one_kernel(
    layer: str, arches: tuple[str, ...], tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = compiled(tmp_path / "p.pipe", source(layer), arches)
    check_legal(plan)
    assert len(steps_of(plan)) == len(arches) * (1 + (layer == "both directions"))
    assert not any(g.loops for g in plan.pipelines[0].gpu)
    assert not any(launch.report.get("spill bytes") for launch in steps_of(plan))
    for arch in arches:
        pipe = open_plan(plan, "layer", f"emulator:{arch}")
        compare(pipe, layer, 3, B, rng)
    for steps, rows in ((0, 2), (1, 1), (2, 0)):
        compare(pipe, layer, steps, rows, rng)


def test_blocks_that_do_not_hand_over_what_they_wrote_are_a_race(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = compiled(tmp_path / "p.pipe", source("gru"), ("sm_80",))
    text = plan.ptx["sm_80"]
    for before, after in (("red.release", "red.relaxed"), ("ld.acquire", "ld.relaxed")):
        assert before in text
        wrong = Plan(plan.pipelines, {}, ptx={"sm_80": text.replace(before, after)})
        with pytest.raises(emulator.Fault, match="race"):
            compare(open_plan(wrong, "layer", "emulator"), "gru", 2, 1, rng)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = installed(monkeypatch)
    yield fake
    assert not fake.faults


def test_a_call_is_as_many_launches_whatever_the_steps(
    tmp_path: Path, rng: np.random.Generator, fake: FakeCuda
) -> None:
    """On a device of 7 multiprocessors, which has no room for more than 14 blocks."""
    text = """
pipeline turned(x: f32[T, 40]) -> f32[600, 40]:
    scan t in 0..T with s = ones([600, 40], f32):
        m = sum(s, axis=1)
        s = 0.5 * s + x[t] * concat([m[1:], m[:1]])[:, None]
    s
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    with open_plan(replace(plan, cubins={}), None, "cuda:0") as pipe:
        ran = []
        for steps in (0, 1, 4):
            x = (0.1 * rng.standard_normal((steps, 40))).astype(np.float32)
            s = np.ones((600, 40))
            for row in x:
                s = 0.5 * s + row * np.roll(s.sum(1), -1)[:, None]
            fake.launched.clear()
            np.testing.assert_allclose(pipe(x=x), s, rtol=1e-4, atol=1e-4)
            ran.append(dict(fake.launched))
        assert ran[0] == ran[1] == ran[2]
        (whole,) = steps_of(plan)
        assert whole.together and ran[0][whole.kernel] == (14, 1, 1)


def test_warps_go_round_where_there_are_fewer_than_units(
    tmp_path: Path, rng: np.random.Generator, fake: FakeCuda
) -> None:
    """17 blocks of 4 warps have a unit each; 14 read the weights at every step."""
    plan = compiled(tmp_path / "p.pipe", source("lstm"), ("sm_90a",))
    with open_plan(replace(plan, cubins={}), None, "cuda:0") as pipe:
        compare(pipe, "lstm", 2, B, rng)
    (whole,) = steps_of(plan)
    assert whole.grid[0] == "17" and dict(fake.launched)[whole.kernel] == (14, 1, 1)


@pytest.mark.parametrize("layer", ["lstm", "gru, reset before"])
def test_few_rows_are_one_kernel_and_many_are_launches(
    layer: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    plan = compiled(tmp_path / "p.pipe", source(layer, "where T in 0..=9"), ("sm_90a",))
    (whole,) = steps_of(plan)
    pipe = open_plan(plan, "layer", "emulator")
    assert isinstance(pipe, DevicePipeline) and isinstance(pipe.driver, EmulatorDriver)
    for rows in (MOST_ROWS, MOST_ROWS + 1):
        compare(pipe, layer, 2, rows, rng)
        ran = [launch.kernel for launch, _ in pipe.driver.records]
        assert ran.count(whole.kernel) == (rows == MOST_ROWS)


def test_what_does_not_fit_is_launched_at_each_step(tmp_path: Path) -> None:
    text = """
pipeline large(x: f32[T]) -> f32[1000000]:
    scan t in 0..T with s = zeros([1000000], f32):
        s = 0.5 * concat([s[1:], s[:1]]) + x[t]
    s
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    assert not steps_of(plan) and plan.pipelines[0].gpu[0].loops
    (said,) = [text for x in launches(plan) for text in because(x)]
    assert "more blocks than should wait for each other" in said


def test_sizes_say_which_way_it_goes(tmp_path: Path, rng: np.random.Generator) -> None:
    text = """
pipeline turned(x: f32[T, D]) -> f32[D]
where D >= 1:
    scan t in 0..T with s = zeros([D], f32):
        s = 0.5 * concat([s[1:], s[:1]]) + x[t]
    s
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    pipe = open_plan(plan, "turned", "emulator")
    assert isinstance(pipe, DevicePipeline) and isinstance(pipe.driver, EmulatorDriver)
    (whole,) = steps_of(plan)
    for size, at_once in ((5, 1), (1000, 1), (600_001, 0)):
        x = rng.standard_normal((3, size)).astype(np.float32)
        wide = 0.25 * np.roll(x[0].astype(float), -2) + 0.5 * np.roll(x[1], -1) + x[2]
        np.testing.assert_allclose(np.asarray(pipe(x=x)), wide, rtol=1e-6, atol=1e-6)
        ran = [launch.kernel for launch, _ in pipe.driver.records]
        assert ran.count(whole.kernel) == at_once


APART = {
    "average": (
        "(x: f32[T, 700]) -> (f32[T, 700], f32[700]):\n"
        "    scan t in 0..T with s = zeros([700], f32), m = full([700], -1e30, f32):\n"
        "        s = 0.5 * s + x[t]\n"
        "        m = maximum(m, s)\n"
        "        y[t] = s\n"
        "    y, m",
        True,
    ),
    "matrix": (
        "(x: f32[T, 3, 65]) -> f32[3, 65]:\n"
        "    scan t in 0..T with s = zeros([3, 65], f32):\n"
        "        s = 0.5 * s + x[t] * x[t, :, :1]\n"
        "    s",
        True,
    ),
    "number": (
        "(x: f32[T]) -> f32:\n    scan t in 0..T with s = 1.0:\n        s = 0.5 * s + x[t]\n    s",
        True,
    ),
    "turned over": (
        "(x: f32[T, 65, 65]) -> f32[65, 65]:\n"
        "    scan t in 0..T with s = zeros([65, 65], f32):\n"
        "        s = 0.5 * transpose(s) + x[t]\n"
        "    s",
        False,
    ),
    "beside": (
        "(x: f32[T, 700]) -> f32[700]:\n"
        "    scan t in 0..T with s = zeros([700], f32):\n"
        "        s = 0.5 * s + x[t] * s[0]\n"
        "    s",
        False,
    ),
}


@pytest.mark.parametrize("name", APART)
def test_lanes_wait_only_for_what_others_wrote(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """What lanes wrote themselves they read with no barrier, or the emulator finds a race."""
    text, apart = APART[name]
    plan = compiled(tmp_path / "p.pipe", f"pipeline p{text}\n", ("sm_80",))
    (whole,) = steps_of(plan)
    entry = plan.ptx["sm_80"].split(f".entry {whole.kernel}(")[1].split(".visible")[0]
    assert whole.stays != apart and ("bar.sync" in entry) != apart
    pipe = open_plan(plan, None, "emulator")
    shape = tuple(int(n) for n in plan.pipelines[0].inputs[0].shape[1:])
    x = rng.standard_normal((4, *shape)).astype(np.float32)
    s = np.ones(()) if not shape else np.zeros(shape)
    m = s - 1e30
    for row in x:
        own = {"matrix": row * row[..., :1] if len(shape) == 2 else row, "beside": row * s.flat[0]}
        s = 0.5 * (s.T if name == "turned over" else s) + own.get(name, row)
        m = np.maximum(m, s)
    found = pipe(x=x)
    if name == "average":
        np.testing.assert_allclose(found[1], m, rtol=1e-5, atol=1e-6)
        found = found[0][-1]
    np.testing.assert_allclose(found, s, rtol=1e-5, atol=1e-6)


def test_columns_of_four_gates_leave_room_for_rows(tmp_path: Path) -> None:
    """A lane holds 64 numbers of an LSTM of 512 units: 16 rows of sums beside them would spill."""
    text = """import nn

pipeline p(x: f32[T, B, 2048], r: f32[2048, 512]) -> f32[T, B, 512]:
    y, _, _ = nn.lstm_steps(x, r)
    y
"""
    for launch in launches(compiled(tmp_path / "p.pipe", text, ("sm_90a",))):
        assert launch.report["spill bytes"] == 0, launch.kernel
