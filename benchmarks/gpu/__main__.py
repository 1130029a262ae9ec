"""`python -m benchmarks.gpu`: tests, comparisons with the emulator, sanitizer, measurements of
whole pipelines and of each kernel.

Writes benchmarks/results/gpu-NAME-TIME.json and .md. A part that fails is named in both, and the
exit code is 1; the other parts are taken all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stagefuse.runtime.cuda import found
from stagefuse.runtime.errors import DeviceError

from ..workloads import FAMILIES
from .compare import compared
from .environment import clocks, environment
from .measure import engine_names

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = ("tests", "emulator", "compare", "sanitize", "measure", "kernels")


def main() -> int:
    options = _options()
    try:
        gpu = found.gpu(0)
        arch = found.arch_of(0)
    except DeviceError as error:
        print(f"nothing to measure on: {error}", file=sys.stderr)
        return 3
    families = [FAMILIES[name] for name in options.only] or list(FAMILIES.values())
    report: dict[str, Any] = {
        "gpu": gpu.name, "arch": arch, "seed": options.seed, "environment": environment(),
    }  # fmt: skip
    print(f"{gpu}, code for {arch}, seed {options.seed}")
    name = re.sub(r"\W+", "-", gpu.name).strip("-").lower()
    path = options.out / f"gpu-{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    for part in options.parts:
        begin = time.perf_counter()
        for so_far in _PARTS[part](families, arch, options):
            report[part] = so_far
            if not options.dry:
                _write(report, path)
        print(f"{part}: {time.perf_counter() - begin:.0f} s", flush=True)
    print(table(report))
    return 0 if all(_sound(report.get(part)) for part in options.parts) else 1


def _write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", type=lambda t: t.split(","), default=[], help="W1,W5a")
    parser.add_argument("--parts", type=lambda t: t.split(","), default=list(PARTS))
    parser.add_argument(
        "--engines", type=lambda t: t.split(","), default=list(engine_names()),
        help="of the measurement, in order",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=30, help="in a round")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for both files")
    parser.add_argument("--dry", action="store_true", help="write no files")
    return parser.parse_args()


def _tests(families: Any, arch: str, options: Any) -> Iterator[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    yield {"good": done.returncode == 0, "output": (done.stdout + done.stderr)[-4000:]}


def _emulator(families: Any, arch: str, options: Any) -> Iterator[dict[str, Any]]:
    """The emulator's own tests, each launch of which is made on the GPU too."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "launches"
        lines.touch()
        jobs = ["-n", "auto"] if find_spec("xdist") else []
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-p",
             "no:benchmark", *jobs, "tests/runtime/emulator", "--hardware",
             "--hardware-report", str(lines)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        launches = [json.loads(line) for line in lines.read_text().splitlines()]
    different = [n for n in launches if n["different"]]
    yield {
        "good": done.returncode == 0,
        "output": (done.stdout + done.stderr)[-4000:],
        "launches": len(launches),
        "elements": sum(n["elements"] for n in launches),
        "different launches": len(different),
        "unexplained": [n for n in different if not n["open"]],
        "left open": sorted({name for n in different for name in n["open"]}),
    }


def _compare(families: Any, arch: str, options: Any) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for row in compared(families, options.seed, "cuda:0", arch):
        rows.append({**asdict(row), "good": row.good})
        said = row.failure or f"{row.different} of {row.elements} differ"
        print(f"  {row.workload}: {said}", flush=True)
        yield rows


def _sanitize(families: Any, arch: str, options: Any) -> Iterator[dict[str, Any]]:
    """The comparison's runs under compute-sanitizer's tools, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"good": True, "skipped": "there is no compute-sanitizer"}
        return
    found: dict[str, Any] = {"good": True}
    only = ",".join(f.name for f in families)
    for name in SANITIZERS:
        done = subprocess.run(
            [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m",
             "benchmarks.gpu", "--parts", "compare", "--dry", "--seed", str(options.seed),
             "--only", only],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        found[name] = {"good": done.returncode != 9, "output": done.stdout[-3000:]}
        found["good"] &= found[name]["good"]
        yield found


def _measure(families: Any, arch: str, options: Any) -> Iterator[dict[str, Any]]:
    from .measure import Gpu, measured

    copy = Gpu("cuda:0").copy_bandwidth()
    found: dict[str, Any] = {"copy_bandwidth": copy, "workloads": {}, "good": True}
    for family in families:
        times, moved = measured(
            family, None, options.seed, "cuda:0", arch, options.rounds, options.calls,
            options.engines,
        )  # fmt: skip
        found["workloads"][family.name] = {
            "title": family.title, "sizes": dict(family.sizes), "bytes": moved,
            "clocks": clocks(), "engines": {name: asdict(t) for name, t in times.items()},
        }  # fmt: skip
        print(f"  {family.name}", *(f"{n}: {_brief(t)}" for n, t in times.items()), flush=True)
        found["good"] &= not any(t.failure for n, t in times.items() if n == "stagefuse")
        yield found


def _kernels(families: Any, arch: str, options: Any) -> Iterator[dict[str, Any]]:
    from .kernels import described, timed
    from .measure import Gpu

    gpu, device = Gpu("cuda:0"), described(found.gpu(0).name, arch)
    report: dict[str, Any] = {"device": device.name, "workloads": {}, "good": True}
    for family in families:
        try:
            report["workloads"][family.name] = timed(family, options.seed, gpu, arch, device)
        except Exception as error:
            print(f"  {family.name}: {type(error).__name__}: {error}", flush=True)
            report["good"] = False
        yield report


def _brief(timed: Any) -> str:
    return timed.failure or f"{min(timed.gpu) * 1e6:.1f} us"


_PARTS = {
    "tests": _tests, "emulator": _emulator, "compare": _compare, "sanitize": _sanitize,
    "measure": _measure, "kernels": _kernels,
}  # fmt: skip


def _sound(part: Any) -> bool:
    return all(row["good"] for row in part) if isinstance(part, list) else bool(part["good"])


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield f"# {report['gpu']}, code for {report['arch']}, seed {report['seed']}\n"
    yield from (f"- {name}: {value}" for name, value in report["environment"].items())
    if "tests" in report:
        last = report["tests"]["output"].strip().splitlines()[-1:] or [""]
        yield f"\nTests: {last[0]}"
    if "emulator" in report:
        yield from _emulated(report["emulator"])
    if "compare" in report:
        yield "\n| workload | elements | bits differ | ulps at most | error | tolerance |"
        yield "|---|---|---|---|---|---|"
        for row in report["compare"]:
            cells = [row["elements"], row["different"], row["ulps"], f"{row['error']:.2g}",
                     f"{row['tolerance']:.2g}"]  # fmt: skip
            said = row["failure"] or " | ".join(map(str, cells))
            yield f"| {row['workload']} | {said} |"
    if "sanitize" in report:
        said = report["sanitize"]
        tools = ", ".join(f"{n}: {'clean' if said[n]['good'] else 'errors'}" for n in SANITIZERS
                          if n in said)  # fmt: skip
        yield f"\ncompute-sanitizer: {said.get('skipped') or tools}"
    if "measure" in report:
        yield from _times(report["measure"])
    if "kernels" in report:
        yield from _predictions(report["kernels"])


def _emulated(found: dict[str, Any]) -> Iterator[str]:
    last = found["output"].strip().splitlines()[-1:] or [""]
    yield f"\nThe emulator's tests with their launches on the GPU: {last[0]}"
    yield (
        f"{found['launches']} launches left {found['elements']} elements; all but "
        f"{found['different launches']} launches the same bits as in the emulator. Those executed "
        f"instructions whose result the PTX ISA leaves open: {', '.join(found['left open'])}."
    )


def _predictions(found: dict[str, Any]) -> Iterator[str]:
    yield "\nEach kernel by itself, the caches overwritten before each call, beside what it takes"
    yield f"at least on a {found['device']} by the model of `explain`, in microseconds.\n"
    yield "| workload | kernel | launches | measured | predicted | bound by | times more |"
    yield "|---|---|---|---|---|---|---|"
    for name, rows in found["workloads"].items():
        for row in rows:
            more = row["measured"] / row["predicted"] if row["predicted"] else float("nan")
            yield (
                f"| {name} | {row['kernel']} | {row['launches']} | {row['measured']:.1f} | "
                f"{row['predicted']:.1f} | {row['bound']} | {more:.1f} |"
            )


def _times(found: dict[str, Any]) -> Iterator[str]:
    from statistics import median

    copy = found["copy_bandwidth"]
    yield f"\nCopy bandwidth: {copy / 1e9:.0f} GB/s."
    yield "Times are microseconds on the GPU, and of the whole call."
    first: dict[str, Any] = next(iter(found["workloads"].values()), {"engines": {}})
    names: Sequence[str] = tuple(first["engines"])
    yield f"\n| workload | {' | '.join(names)} | of copy bandwidth |"
    yield "|---" * (len(names) + 2) + "|"
    for name, workload in found["workloads"].items():
        cells = []
        for engine in names:
            timed = workload["engines"][engine]
            cells.append(
                timed["failure"]
                or f"{median(timed['gpu']) * 1e6:.1f} ({median(timed['call']) * 1e6:.0f})"
            )
        ours = workload["engines"].get("stagefuse", {"gpu": []})["gpu"]
        share = f"{100 * workload['bytes'] / median(ours) / copy:.0f} %" if ours else ""
        yield f"| {name} {workload['title']} | {' | '.join(cells)} | {share} |"


if __name__ == "__main__":
    sys.exit(main())
