"""The score over the `onnx` package's backend node tests, by family of ops.

python -m benchmarks.onnx_score                   # all, about a second each
python -m benchmarks.onnx_score --only 'softmax'  # tests whose name matches
python -m benchmarks.onnx_score --import-only     # whether they can be imported, quickly
python -m benchmarks.onnx_score --write docs/onnx-score.md
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from stagefuse.onnx import Backend, OnnxError, import_model
from stagefuse.onnx.record import records
from stagefuse.onnx.schemas import schema_of

SECONDS = 60
"""A test that takes longer fails."""


@dataclass(frozen=True)
class Outcome:
    """How one test went: passed, refused (not imported), wrong, or failed; and why."""

    test: str
    op: str
    status: str
    reason: str = ""
    seconds: float = 0.0


KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")


@dataclass(frozen=True)
class Stored:
    """A test that the standard keeps as files."""

    name: str
    folder: str
    rtol: float
    atol: float

    @cached_property
    def model(self) -> Any:
        return onnx.load(f"{self.folder}/model.onnx")

    @cached_property
    def data_sets(self) -> list[tuple[list[Any], list[Any]]]:
        found = []
        for path in sorted(Path(self.folder).glob("test_data_set_*")):
            found.append((self._tensors(path, "input"), self._tensors(path, "output")))
        return found

    @staticmethod
    def _tensors(path: Path, what: str) -> list[Any]:
        files = sorted(path.glob(f"{what}_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
        return [onnx.load_tensor(str(f)) for f in files]


@cache
def all_cases(kind: str = "node") -> dict[str, Any]:
    """The tests of a kind by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind=kind)
    return {
        c.name: c if c.model is not None else Stored(c.name, c.model_dir, c.rtol, c.atol)
        for c in found
    }


def cases(pattern: str, kind: str = "node") -> list[Any]:
    """The tests of a kind whose name matches."""
    return [c for name, c in all_cases(kind).items() if re.search(pattern, name)]


def op_of(case: Any) -> str:
    """The op that a test is about; of an expanded one, the op that was expanded."""
    plain = all_cases().get(re.sub(r"_expanded.*$", "", case.name), case)
    return str(plain.model.graph.node[-1].op_type)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(case: Any, device: str, import_only: bool) -> Outcome:
    """Run one test."""
    op, start = op_of(case), time.perf_counter()

    def ended(status: str, reason: str = "") -> Outcome:
        text = " ".join(reason.split())[:300]
        return Outcome(case.name, op, status, text, time.perf_counter() - start)

    try:
        with limited(SECONDS):
            if import_only:
                imported(case)
            else:
                executed(case, device)
    except OnnxError as error:
        return ended("refused", str(error.problems[0]))
    except AssertionError as error:
        return ended("wrong", str(error))
    except Exception as error:
        return ended("failed", f"{type(error).__name__}: {error}")
    return ended("passed")


def imported(case: Any) -> None:
    """Import a test's model, with the inputs fixed that it needs."""
    inputs = {i.name: x for i, x in zip(case.model.graph.input, case.data_sets[0][0], strict=False)}
    fixed: dict[str, Any] = {}
    while True:
        try:
            import_model(case.model, fixed=fixed)
            return
        except OnnxError as error:
            more = {i for p in error.problems for i in p.inputs} - set(fixed)
            if any(not p.inputs for p in error.problems) or not more:
                raise
            fixed |= {name: inputs[name] for name in more}


def executed(case: Any, device: str) -> None:
    """Run a test as the standard's runner does, with its tolerances."""
    rep = Backend.prepare(case.model, device)
    for inputs, wanted in case.data_sets:
        found = list(rep.run(list(map(array_of, inputs))))
        right = list(map(array_of, wanted))
        Runner.assert_similar_outputs(right, found, rtol=case.rtol, atol=case.atol)


def array_of(value: Any) -> Any:
    """What a test gives: an array, or a tensor of the standard."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def family_of(op: str) -> str:
    """The module of the op's record; ops that the standard defines by others are functions."""
    record = records().get(op)
    if record is not None:
        return record.family
    if op in ("If", "Loop", "Scan", "Shape", "Size"):
        return "control and shapes"
    schema = schema_of(op, onnx.defs.onnx_opset_version(), "")
    if schema is not None and (schema.has_function or schema.has_context_dependent_function):
        return "functions"
    return "not supported"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Scores by family and op, as text."""
    groups: dict[str, list[Outcome]] = collections.defaultdict(list)
    for o in outcomes:
        groups[family_of(o.op)].append(o)
    lines = []
    for family in sorted(groups):
        found = groups[family]
        passed = sum(o.status == "passed" for o in found)
        lines.append(f"{family:<16}{passed:>5} of {len(found):>4}")
    passed = sum(o.status == "passed" for o in outcomes)
    return "\n".join([*lines, f"{'all':<16}{passed:>5} of {len(outcomes):>4}"])


def page(outcomes: Sequence[Outcome], device: str) -> str:
    """The page of scores: a table by family, and every miss with its reason."""
    lines = [
        "# ONNX: the node tests of the standard",
        "",
        f"What `python -m benchmarks.onnx_score --device {device} --write docs/onnx-score.md`",
        f"found with onnx {onnx.__version__}: how many of the standard's backend node tests pass,",
        "with its tolerances, and why others do not. [onnx.md](onnx.md) says what is imported.",
        "",
        "| family | passed | of | |",
        "|---|---|---|---|",
    ]
    groups: dict[str, list[Outcome]] = collections.defaultdict(list)
    for o in outcomes:
        groups[family_of(o.op)].append(o)
    for family in sorted(groups):
        missed = collections.Counter(o.op for o in groups[family] if o.status != "passed")
        named = ", ".join(f"{op} {count}" for op, count in sorted(missed.items()))
        passed = len(groups[family]) - sum(missed.values())
        lines.append(f"| {family} | {passed} | {len(groups[family])} | {named} |")
    passed = sum(o.status == "passed" for o in outcomes)
    lines += [f"| **all** | **{passed}** | **{len(outcomes)}** | |", "", "## Misses", ""]
    reasons: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for o in outcomes:
        if o.status != "passed":
            reasons[o.op, f"{o.status}: {_plain(o)}"].append(o.test)
    lines += ["| op | tests | why |", "|---|---|---|"]
    for (op, reason), tests in sorted(reasons.items()):
        lines.append(f"| {op} | {len(tests)} | {reason} |")
    return "\n".join(lines) + "\n"


def _plain(o: Outcome) -> str:
    """A reason without what differs from test to test."""
    if o.status == "wrong":
        return "numbers differ by more than the test allows"
    text = re.sub(r"reproducer:.*|in `[^`]*`?.*|Mismatch.*", "", o.reason)
    text = re.sub(r"^\w+ `[^`]*`: ", "", text).replace("|", "/").replace("= needs:", "; needs")
    return text.strip()[:160]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--kind", default="node", choices=KINDS)
    parser.add_argument("--device", default="CPU")
    parser.add_argument("--import-only", action="store_true")
    parser.add_argument("--json", type=Path, help="keep outcomes here; those that passed are kept")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    kept: dict[str, Outcome] = {}
    if options.json and options.json.exists():
        kept = {o["test"]: Outcome(**o) for o in json.loads(options.json.read_text())}
    for case in cases(options.only, options.kind):
        if case.name in kept and kept[case.name].status == "passed":
            continue
        found = kept[case.name] = outcome(case, options.device, options.import_only)
        if found.status != "passed":
            print(f"{found.status:<8}{found.op:<20}{found.test}: {found.reason}", flush=True)
        if options.json and len(kept) % 20 == 0:
            options.json.write_text(json.dumps([asdict(o) for o in kept.values()]))
    outcomes = [o for name, o in sorted(kept.items()) if re.search(options.only, name)]
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in kept.values()]))
    print(summary(outcomes))
    if options.write:
        options.write.write_text(page(outcomes, options.device), encoding="utf-8")
    return 0


if __name__ == "__main__":
    assert onnx is not None
    sys.exit(main())
