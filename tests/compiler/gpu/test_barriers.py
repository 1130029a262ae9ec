"""Barriers around what may not run, and between the turns of a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.gpu.emit import KernelWriter, module_text
from stagefuse.compiler.kernel_text import parse_kernel
from stagefuse.compiler.kernel_verify import verify_kernel
from stagefuse.dsl.facts import Facts
from stagefuse.runtime import emulator

KERNEL = """\
stagefuse kernel 1
kernel k for p
buffer b0 : in f32[N, 128]
buffer b1 : out f32[N, 128]
buffer b2 : out f32[N, 128]
dims N T
parallel d0 in N
alloc a : f32[2, 64]
alloc b : f32[2, 64]
for i in 0..2 vector
  for j in 0..64 vector
    store a[i, j] = b0.f32[d0, 64*i + j]
BETWEEN
  for i in 0..2 vector
    for j in 0..64 vector
      store b[i, j] = b0.f32[d0, 64*i + j]
  for i in 0..2 vector
    for j in 0..64 vector
      store b2[d0, 64*i + j] = b.f32[i, (j + 1) % 64]
for i in 0..2 vector
  for j in 0..64 vector
    store b1[d0, 64*i + j] = a.f32[i, (j + 1) % 64]
"""


def launched(text: str, turns: int, arrays: list[Any]) -> None:
    """Runs a kernel with two steps in the emulator."""
    facts, sizes = Facts().with_ranges({"N": (1, 8), "T": (0, 8)}), {"N": 2, "T": turns}
    kernel = parse_kernel(text)
    verify_kernel(kernel, facts)
    entry = KernelWriter(kernel, facts, 96 << 10, {}).entry("k", [])
    emulator.load(module_text([entry], "sm_80", "p.pipe")).launch(
        "k", grid=entry.grid.evaluate(sizes), block=entry.team.threads,
        shared_bytes=entry.shared_bytes.evaluate(sizes),
        args=[*arrays, np.int64(2), np.int64(turns), np.zeros(2, np.int64)],
    )  # fmt: skip


@pytest.mark.parametrize("between", ["if lt.bool(index(d0), index(T))", "for t in 0..T"])
def test_a_barrier_that_may_not_run_orders_nothing_after_it(
    between: str, rng: np.random.Generator
) -> None:
    """In a branch, or in a loop that may have no turn."""
    x = rng.standard_normal((2, 128), np.float32)
    for turns in (0, 2):
        out, other = np.zeros_like(x), np.zeros_like(x)
        launched(KERNEL.replace("BETWEEN", between), turns, [x, out, other])
        wanted = np.roll(x.reshape(2, 2, 64), -1, 2).reshape(2, 128)
        np.testing.assert_array_equal(out, wanted)


TURNS = """\
stagefuse kernel 1
kernel k for p
buffer b0 : in f32[N, T, 64]
buffer b1 : out f32[N]
dims N T
parallel d0 in N
alloc a : f32[64]
alloc total : f32[]
store total[] = f32(0.0)
for t in 0..T
  for j in 0..64 vector
    store a[j] = b0.f32[d0, t, j]
  fold r = max over (j in 64) : f32 of mul.f32(a.f32[(j + 1) % 64], cast.f32(index(j)))
  store total[] = add.f32(total.f32[], $r.f32)
store b1[d0] = total.f32[]
"""


def test_what_a_turn_reads_is_not_written_by_the_next_before(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 5, 64), np.float32)
    out = np.zeros(2, np.float32)
    launched(TURNS, 5, [x, out])
    wanted = (np.roll(x, -1, 2).astype(float) * np.arange(64)).max(2).sum(1)
    np.testing.assert_allclose(out, wanted, rtol=16 * 2.0**-24)
