"""Random pipelines with states, their updates and reads in any order, against NumPy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import stagefuse as sf

S, N = 4, 3
HEAD = f"""\
fn put(x: f32[{S}, {N}], at: i64, y: f32[{N}]) -> f32[{S}, {N}]:
    x[at] = y
    x

pipeline p(u: f32[{N}], n: i64, m: i64, ids: i64[2]) -> (f32[{S}, {N}], f32[{N}], f32[{S}, {N}]):
    state a: f32[{S}, {N}] = 0.0
    state b: f32[{S}, {N}] = 1.0
    c = a
    r = u
"""


@dataclass
class Program:
    """Lines of a body, which are also the statements of a model in Python."""

    rng: random.Random
    lines: list[str] = field(default_factory=list)

    def matrix(self) -> str:
        x, y = self.rng.choice("abc"), self.rng.choice("abc")
        return self.rng.choice([x, f"{x} + {y}", f"{x} * 0.5", f"{x} - {y} * 0.25", f"{x}[::-1]",
                                f"{x}[ids[0]] + {y}", f"put({x}, n, {self.row()})"])  # fmt: skip

    def row(self) -> str:
        x, at = self.rng.choice("abc"), self.rng.choice(["0", "-1", "n", "m", "2"])
        return self.rng.choice(["u", "r", f"{x}[{at}]", f"{x}[{at}] + r", f"{x}[{at}] * 0.5",
                                f"sum({x}, axis=0) * 0.25", f"{x}[{at}] - u"])  # fmt: skip

    def step(self) -> None:
        x, at = self.rng.choice("abc"), self.rng.choice(["0", "-1", "n", "m"])
        y, z = self.rng.choice("abc"), self.rng.choice("abc")
        self.lines.append(self.rng.choice([
            f"{x}[{at}] = {self.row()}", f"{x}[{at}] = {self.row()}", f"r = {self.row()}",
            f"{x} = {self.matrix()}", f"{x}[1:3] = {y}[n] + {z}[:2]", f"{x}[:, 1] = {y}[:, 0]",
            f"{x}[ids] = {y}[1:3]", f"{x}[{at}, 1:] = {y}[n, :2]",
            f"{x}[{at}] = {x}[{at}] * 2.0 - 1.0",
        ]))  # fmt: skip


class Values(dict[str, Any]):
    """The names of a model: what is assigned becomes a copy of its own, as values are."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, np.array(value, np.float64) if name in "abcr" else value)


def run(lines: Sequence[str], names: Values) -> dict[str, Any]:
    """The names after the lines, in float64; `s` is the last result."""
    for line in lines:
        target, _, value = line.partition(" = ")
        found = np.array(eval(value, {"sum": np.sum, "put": put}, names), np.float64)
        if "[" not in target:
            names[target] = found
            continue
        name, _, items = target.partition("[")
        new = np.array(names[name])
        at = eval(f"at[{items}", {}, {**names, "at": np.s_})
        if items == "ids]":
            for place, row in zip(names["ids"], found, strict=True):
                new[place] = row
        else:
            new[at] = found
        names[name] = new
    return {**names, "s": names["b"] + names["c"]}


def sizes(lines: Sequence[str], names: Values) -> dict[str, Any]:
    """What all numbers are at most, where nothing cancels: sums of absolute values."""
    absolute = Values()
    for name, value in names.items():
        absolute[name] = np.abs(value) if name in "abcru" else value
    return run([line.replace(" - ", " + ") for line in lines], absolute)


def put(x: Any, at: Any, y: Any) -> Any:
    found = np.array(x)
    found[at] = y
    return found


@pytest.mark.parametrize("device", ["cpu"] * 6 + ["emulator"])
def test_random_updates_equal_numpy(
    device: str, chance: random.Random, rng: np.random.Generator
) -> None:
    program = Program(chance)
    for _ in range(program.rng.randrange(3, 10)):
        program.step()
    body = "".join(f"    {line}\n" for line in program.lines)
    print(body)
    with sf.compile(HEAD + body + "    a, r, b + c\n", device=device) as pipe:
        session = pipe.session()
        a, b = np.zeros((S, N), np.float32), np.ones((S, N), np.float32)
        for _ in range(3):
            given = {"u": rng.standard_normal(N).astype(np.float32),
                     "n": int(rng.integers(0, 3)), "m": int(rng.integers(-S, S)),
                     "ids": rng.integers(-S, S, 2)}  # fmt: skip
            names = Values()
            for name, value in {**given, "a": a, "b": b, "c": a, "r": given["u"]}.items():
                names[name] = value
            most = sizes(program.lines, Values(names))
            wanted = run(program.lines, names)
            # a line rounds four times at most, where it sums a column and updates by that; the
            # last sum once
            error = 1.001 * (4 * len(program.lines) + 1) * 2.0**-24
            found = dict(zip("ars", session(**given), strict=True))
            for name, ours in (*found.items(), *session.snapshot().items()):
                assert (np.abs(ours - wanted[name]) <= error * most[name]).all(), name
            a, b = session.state["a"], session.state["b"]
