"""Random programs equal what NumPy says of them, within the errors that their roundings may have.

A failure prints the program, its seed and that of the data (tests/conftest.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.plan import LEVELS
from stagefuse.runtime import native
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.devices import open_plan
from stagefuse.runtime.pipeline import Pipeline

from . import measured as m
from .growing import Node
from .programs import Program, array, compiled, laid_out
from .sizes import Sizes, sized

SIZES: tuple[Sizes, ...] = (
    {"M": 5, "N": 7, "K": 13}, {"M": 0, "N": 3, "K": 5}, {"M": 33, "N": 2, "K": 17},
    {"M": 3, "N": 0, "K": 70}, {"M": 1, "N": 1, "K": 1},
)  # fmt: skip
WAYS = {  # what a program starts with, the sizes among its shapes, and its steps
    "mixed": ((), (1, 2, 3, 5, 8), 10),
    "wide": ((), (1, 16, 48, 64), 6),
    "views": (("views",), (1, 2, 3, 8), 3),
    "attention": (("attention",), (1, 5, 16), 2),
    "convolution": (("convolution",), (1, 3, 8), 2),
}


def chosen(way: str, seed: int) -> tuple[Program, list[Node], str]:
    """A random program, its results and its text, which is printed."""
    first, sizes, steps = WAYS[way]
    program = Program(seed, steps, consts=sizes, first=first)
    results = program.results()
    text = program.source(results)
    print(text)
    return program, results, text


def dirty(wanted: m.Measured) -> Any:
    """An array for a result, full of what none of its elements is."""
    dtype = np.dtype(m.numpy_dtype(wanted.dtype))
    raw = np.full(wanted.v.size * dtype.itemsize, 0x5A, np.uint8)
    return raw.view(dtype).reshape(wanted.v.shape)


def wrong(
    pipe: Pipeline, program: Program, results: list[Node], sizes: Sizes, rng: np.random.Generator
) -> list[str]:
    """What a call with random inputs gives that it should not."""
    special = bool(rng.random() < 0.4)
    inputs = {n.name: array(rng, sized(n.shape, sizes), n.dtype, special) for n in program.inputs}
    wanted = program.values(sizes, inputs, results)
    used = program.used(program.live(results))
    out = tuple(dirty(wanted[n.name]) for n in results)
    given = {n.name: laid_out(rng, inputs[n.name]) for n in used}
    pipe(**given, out=out if len(out) > 1 else out[0])
    said = [(n.name, m.check(a, wanted[n.name])) for n, a in zip(results, out, strict=True)]
    if pipe.device == "cpu":
        for _ in range(2):  # the second one runs no Python
            found = pipe(**{n.name: inputs[n.name] for n in used})
            alike = found if len(out) > 1 else (found,)
            said += [
                (n.name, "" if a.tobytes() == b.tobytes() else "another call gives another result")
                for n, a, b in zip(results, alike, out, strict=True)
            ]
    return [f"{pipe.device}, {sizes}: {name}: {text}" for name, text in said if text]


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("way", WAYS)
def test_on_the_cpu(
    way: str,
    turn: int,
    program_seed: int,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, results, text = chosen(way, program_seed)
    plan = compiled(text, ["cpu"], LEVELS)
    for level, threads, tiles in (("v3", 1, False), ("v4", 2, True), ("v4", 1, False)):
        if level > (native.detect_level() or ""):
            continue
        with monkeypatch.context() as patch:
            patch.setattr(native, "detect_level", lambda *_, level=level: level)
            pipe = CpuPipeline(plan, threads=threads, tiles=tiles)
        with pipe:
            for some in SIZES:
                assert not wrong(pipe, program, results, program.sizes(some), rng)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("way", WAYS)
def test_in_the_emulator(
    way: str,
    arch: str,
    program_seed: int,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(m, "factor_error", m.TF32_PARTS)
    program, results, text = chosen(way, program_seed)
    with open_plan(compiled(text, [arch], LEVELS), None, f"emulator:{arch}") as pipe:
        for some in SIZES[:2]:
            assert not wrong(pipe, program, results, program.sizes(some), rng)
