"""How fast the emulator is: instructions executed by a thread, per second of this processor.

    python benchmarks/emulator.py [--json FILE]

Three kernels of different kinds, each with all checks and without the search for races: pointwise
arithmetic, sums of rows through shared memory and shuffles, and a product of f16 matrices with
`cp.async`, `ldmatrix` and `mma.sync`. Then two pipelines of ours for an H200, with all checks: a
product by tensor copies and `wgmma`, and a sort of rows. Last, how long reading a text takes, and
making it ready to run: sorts of up to a million. Times are the processor's own (`process_time`),
the best of three runs, since other work on the machine takes nothing from them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stagefuse.compiler.driver import compile_file  # noqa: E402
from stagefuse.compiler.ptx import ModuleBuilder, print_module  # noqa: E402
from stagefuse.runtime import emulator  # noqa: E402

Launch = Callable[[bool], emulator.Record]


@dataclass(frozen=True)
class Speed:
    """One measurement: `instructions` are executions by a thread."""

    kernel: str
    races: bool
    instructions: int
    seconds: float

    @property
    def rate(self) -> float:
        """Millions of instructions a second."""
        return self.instructions / self.seconds / 1e6


def pointwise(n: int = 1 << 20) -> Launch:
    """x * sigmoid(1.702 x), a thread for each element."""
    b = ModuleBuilder("sm_80")
    k = b.entry("silu", [("x", "u64"), ("y", "u64"), ("n", "u32")], block=(256, 1, 1))
    i = k.op("mad.lo.u32", k.special("ctaid.x"), 256, k.special("tid.x"))
    with k.when(k.r("setp.lt.u32", i, k.param("n"))):
        offset = k.r("mul.wide.u32", i, 4)
        x = k.r("ld.global.f32", k.op("add.u64", k.param("x"), offset))
        e = k.r("ex2.approx.ftz.f32", k.op("mul.rn.f32", x, -1.702 * 1.442695))
        y = k.r("div.full.f32", x, k.op("add.rn.f32", e, 1.0))
        k.op("st.global.f32", k.op("add.u64", k.param("y"), offset), y)
    module = emulator.load(print_module(b.module()))
    x_array = np.linspace(-5, 5, n, dtype=np.float32)
    args: list[Any] = [x_array, np.zeros_like(x_array), np.uint32(n)]
    return lambda races: module.launch("silu", grid=n // 256, block=256, args=args, races=races)


def rows(count: int = 2048, width: int = 1024) -> Launch:
    """The sum of each row: a block a row, partial sums by shuffles, then through shared memory."""
    b = ModuleBuilder("sm_80")
    k = b.entry("rows", [("x", "u64"), ("y", "u64")], block=(256, 1, 1))
    partial = k.shared("partial", "f32", 8)
    tid, row = k.special("tid.x"), k.special("ctaid.x")
    start = k.r("mad.lo.u32", row, width, k.op("shl.b32", tid, 2))
    at = k.r("add.u64", k.param("x"), k.op("mul.wide.u32", start, 4))
    parts = k.op("ld.global.v4.f32", at)
    total = parts[0]
    for part in parts[1:]:
        total = k.r("add.rn.f32", total, part)
    for lanes in (16, 8, 4, 2, 1):
        other = k.op("shfl.sync.bfly.b32", total, lanes, 31, -1)
        total = k.r("add.rn.f32", total, other)
    slot = k.r("shr.u32", tid, 5)
    base = k.r("mov.u32", partial)
    with k.when(k.r("setp.eq.u32", k.op("and.b32", tid, 31), 0)):
        k.op("st.shared.f32", k.op("mad.lo.u32", slot, 4, base), total)
    k.op("bar.sync", 0)
    with k.when(k.r("setp.eq.u32", tid, 0)):
        total = k.r("ld.shared.f32", partial)
        for warp in range(1, 8):
            total = k.r("add.rn.f32", total, k.op("ld.shared.f32", k.addr(partial, 4 * warp)))
        out = k.r("add.u64", k.param("y"), k.op("mul.wide.u32", row, 4))
        k.op("st.global.f32", out, total)
    module = emulator.load(print_module(b.module()))
    x = np.ones((count, width), np.float32)
    args = [x, np.zeros(count, np.float32)]
    return lambda races: module.launch("rows", grid=count, block=256, args=args, races=races)


def product(size: int = 512) -> Launch:
    """A warp a tile of 16 x 8 of the product of two f16 matrices."""
    b = ModuleBuilder("sm_80")
    k = b.entry("product", [("a", "u64"), ("b", "u64"), ("c", "u64")], block=(32, 1, 1))
    tile_a, tile_b = k.shared("rows", "b8", 16 * 32), k.shared("columns", "b8", 8 * 32)
    lane, row, column = k.special("tid.x"), k.special("ctaid.x"), k.special("ctaid.y")
    half, line = k.r("and.b32", lane, 1), k.r("shr.u32", lane, 1)
    a_row = k.r("mad.lo.u32", row, 16, line)
    b_row = k.r("mad.lo.u32", column, 8, k.op("and.b32", line, 7))
    sources = []
    for name, which in (("a", a_row), ("b", b_row)):
        element = k.r("mad.lo.u32", which, size, k.op("shl.b32", half, 3))
        sources.append(k.r("add.u64", k.param(name), k.op("mul.wide.u32", element, 2)))
    to_a = k.r("mad.lo.u32", lane, 16, k.op("mov.u32", tile_a))
    to_b = k.r("mad.lo.u32", k.op("and.b32", lane, 15), 16, k.op("mov.u32", tile_b))
    is_low = k.r("setp.lt.u32", lane, 16)
    from_a = k.r("mad.lo.u32", k.op("and.b32", lane, 15), 32, k.op("mov.u32", tile_a))
    from_a = k.r("mad.lo.u32", k.op("shr.u32", lane, 4), 16, from_a)
    from_b = k.r("mad.lo.u32", k.op("and.b32", lane, 7), 32, k.op("mov.u32", tile_b))
    from_b = k.r("mad.lo.u32", k.op("and.b32", line, 4), 4, from_b)
    total = [k.r("mov.f32", 0.0) for _ in range(4)]
    step = k.r("mov.u32", 0)
    with k.loop(step, size // 16):
        k.op("cp.async.cg.shared.global", to_a, sources[0], 16)
        k.op("cp.async.cg.shared.global", to_b, sources[1], 16, guard=is_low)
        k.op("cp.async.wait_all")
        k.op("bar.warp.sync", -1)
        a = k.op("ldmatrix.sync.aligned.m8n8.x4.shared.b16", from_a)
        mine = k.op("ldmatrix.sync.aligned.m8n8.x2.shared.b16", from_b)
        name = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        k.op(name, a, mine, total, into=total)
        k.op("bar.warp.sync", -1)
        for source in sources:
            k.op("add.u64", source, 32, into=source)
    group = k.r("mad.lo.u32", row, 16, k.op("shr.u32", lane, 2))
    left = k.r("mad.lo.u32", column, 8, k.op("shl.b32", k.op("and.b32", lane, 3), 1))
    at = k.r("mad.lo.u32", group, size, left)
    out = k.r("add.u64", k.param("c"), k.op("mul.wide.u32", at, 4))
    k.op("st.global.v2.f32", out, total[:2])
    k.op("st.global.v2.f32", k.addr(out, 8 * size * 4), total[2:])
    module = emulator.load(print_module(b.module()))
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-2, 3, (size, size)).astype(np.float16) for _ in range(2))
    c = np.zeros((size, size), np.float32)

    def launch(races: bool) -> emulator.Record:
        grid = (size // 16, size // 8)
        record = module.launch("product", grid=grid, block=32, args=[x, y, c], races=races)
        assert (c == x.astype(np.float32) @ y.astype(np.float32).T).all()
        return record

    return launch


PIPELINES: dict[str, tuple[str, dict[str, tuple[tuple[int, ...], Any]]]] = {
    "wgmma": ("pipeline p(x: f16[M, K], y: f16[K, N]) -> f16[M, N]\n"
              "where M in 1..=512, K in 1..=512, N in 1..=512:\n    x @ y\n",
              {"x": ((512, 512), np.float16), "y": ((512, 512), np.float16)}),
    "sort": ("pipeline p(x: f32[B, N]) -> f32[B, N]\nwhere B in 1..=256, N in 1..=1024:\n"
             "    sort(x, axis=-1)\n", {"x": ((256, 1000), np.float32)}),
}  # fmt: skip
"""Sources, and the shapes and dtypes of inputs."""


def pipeline(name: str, folder: Path) -> Callable[[], int]:
    """A pipeline compiled for the emulator: a call that gives the instructions run."""
    import stagefuse as sf

    text, inputs = PIPELINES[name]
    path = folder / f"{name}.pipe"
    path.write_text(text)
    pipe: Any = sf.compile(path, target="h200", device="emulator")
    rng = np.random.default_rng(0)
    given = {n: rng.standard_normal(shape).astype(dtype) for n, (shape, dtype) in inputs.items()}

    def call() -> int:
        pipe(**given)
        return sum(record.total for _, record in pipe.driver.records)

    return call


def loading(text: str, repeats: int = 3) -> tuple[float, float]:
    """Seconds to load a text, and to make all of its kernels ready."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        start = time.process_time()
        program = emulator.load(text).program
        loaded = time.process_time()
        for code in program.codes.values():
            code.make_ready(program)
        spent = loaded - start, time.process_time() - loaded
        best = [min(a, b) for a, b in zip(best, spent, strict=True)]
    return best[0], best[1]


def measure(name: str, launch: Launch, races: bool, repeats: int = 3) -> Speed:
    """The best of some launches."""
    best, record = float("inf"), launch(races)
    for _ in range(repeats):
        start = time.process_time()
        record = launch(races)
        best = min(best, time.process_time() - start)
    return Speed(name, races, record.total, best)


def measure_call(name: str, call: Callable[[], int], repeats: int = 3) -> Speed:
    """The best of some calls of a pipeline."""
    best, instructions = float("inf"), call()
    for _ in range(repeats):
        start = time.process_time()
        instructions = call()
        best = min(best, time.process_time() - start)
    return Speed(name, True, instructions, best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    speeds = [
        measure(name, launch, races)
        for name, launch in (("pointwise", pointwise()), ("rows", rows()), ("product", product()))
        for races in (True, False)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in PIPELINES:
            speeds.append(measure_call(name, pipeline(name, Path(folder))))
        path = Path(folder) / "long.pipe"
        path.write_text(PIPELINES["sort"][0].replace("1024", "1000000"))
        (text,) = compile_file(path, targets=["h200"]).ptx.values()
    read, ready = loading(text)
    print(f"{'kernel':12}{'races':8}{'million instructions':>22}{'seconds':>10}{'million/s':>12}")
    for s in speeds:
        checked = "yes" if s.races else "no"
        millions = s.instructions / 1e6
        print(f"{s.kernel:12}{checked:8}{millions:22.1f}{s.seconds:10.3f}{s.rate:12.0f}")
    print(f"loading {len(text) / 1e6:.2f} MB of sorts: {read:.2f} s, made ready in {ready:.2f} s")
    if options.json:
        options.json.write_text(
            json.dumps([asdict(s) | {"rate": s.rate} for s in speeds], indent=1)
        )


if __name__ == "__main__":
    main()
