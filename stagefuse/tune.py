"""Schedules by measurement: `stagefuse compile model.pipe --tune`.

The pipeline is compiled by the rules and once for each trial of `compiler/schedule.py`, which
changes one number in the schedules of all kernels. Both take turns, kernel by kernel; a kernel
keeps the change that gained most, if that is more than times differ by themselves. In the end whole
calls are compared in the same way, and if they are not faster nothing is kept.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from stagefuse.compiler.schedule import TRIALS
from stagefuse.compiler.tuned import RULES, Changes, Choices, Everywhere, Tuned
from stagefuse.dsl.frozen import frozen

if TYPE_CHECKING:
    from stagefuse.runtime.pipeline import Pipeline

TARGET = "cpu"
ROUNDS = 7
CALLS = 3  # of a round
GAIN = 0.03
"""A smaller gain is taken for chance."""
CLOSE = 1e-3
"""How far results of a trial may be from the rules', of the largest: sums have another order."""

Open = Callable[[Choices], "Pipeline"]
Times = dict[int, list[float]]


@frozen
class Gain:
    """A kernel, the change that it keeps, and its time over the time by the rules."""

    kernel: str
    label: str
    changes: Changes
    ratio: float


@frozen
class Found:
    """The choices, what each gained, and the time of whole calls over that by the rules."""

    tuned: Tuned
    gains: tuple[Gain, ...]
    ratio: float


def tune(
    opened: Open, inputs: Mapping[str, Any], measured: Mapping[str, Any],
    say: Callable[[str], None] = lambda text: None,
) -> Found:  # fmt: skip
    """The schedules that are fastest for these inputs on this machine.

    `opened` gives the pipeline compiled by choices, ready to call; `measured` goes into the lock
    file as it is.
    """
    with opened(RULES) as rules:
        names = [(step.symbol, step.label or step.symbol) for step in rules._plan.steps]
        best: dict[str, Gain] = {}
        expected = _listed(rules(**inputs))
        for field, value in _trials():
            say(f"{field} = {value}")
            with opened(Everywhere(TARGET, {field: value})) as trial:
                if _same_kernels(rules, trial) or not _close(trial, inputs, expected):
                    continue
                for kernel, ratio in _ratios(rules, trial, inputs, names).items():
                    if ratio < min(1 - GAIN, best[kernel].ratio if kernel in best else 1):
                        label = next(label for symbol, label in names if symbol == kernel)
                        best[kernel] = Gain(kernel, label, {field: value}, ratio)
        gains = tuple(sorted(best.values(), key=lambda gain: gain.ratio))
        tuned = Tuned({TARGET: {g.kernel: g.changes for g in gains}}, measured)
        if not gains:
            return Found(Tuned({}, measured), (), 1.0)
        with opened(tuned) as whole:
            ratio = _call_ratio(rules, whole, inputs)
    if ratio >= 1:
        return Found(Tuned({}, measured), (), 1.0)
    return Found(tuned, gains, ratio)


def _trials() -> Iterator[tuple[str, int]]:
    for field, values in TRIALS[TARGET].items():
        for value in values:
            yield field, value


def _same_kernels(rules: Pipeline, trial: Pipeline) -> bool:
    """Whether the trial changed nothing, neither loops nor how they are handed to threads."""
    return [(s.symbol, s.grain) for s in rules._plan.steps] == [
        (s.symbol, s.grain) for s in trial._plan.steps
    ]


def _close(trial: Pipeline, inputs: Mapping[str, Any], expected: Sequence[Any]) -> bool:
    for found, wanted in zip(_listed(trial(**inputs)), expected, strict=True):
        if found.dtype.kind in "iub":
            if not np.array_equal(found, wanted):
                return False
            continue
        one, two = (x.astype(np.float64) for x in (found, wanted))
        largest = np.max(np.abs(two[np.isfinite(two)]), initial=0.0)
        if not np.allclose(one, two, rtol=CLOSE, atol=CLOSE * float(largest), equal_nan=True):
            return False
    return True


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


def _ratios(
    rules: Pipeline, trial: Pipeline, inputs: Mapping[str, Any], names: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Each kernel's time in a trial over that by the rules, its steps together."""
    both: list[Times] = [defaultdict(list), defaultdict(list)]
    for turn in range(ROUNDS):
        order = list(zip((rules, trial), both, strict=True))
        for pipe, times in order if turn % 2 else order[::-1]:
            for step, taken in _step_times(pipe, inputs).items():
                times[step].append(taken)
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for step, (symbol, _) in enumerate(names):
        for which in range(2):
            totals[symbol][which] += median(both[which][step]) if both[which][step] else 0.0
    return {symbol: new / old for symbol, (old, new) in totals.items() if old > 0}


def _step_times(pipe: Pipeline, inputs: Mapping[str, Any]) -> dict[int, float]:
    """Microseconds of each step of a call, the median of some calls."""
    with tempfile.TemporaryDirectory() as folder:
        trace = pipe.profile(Path(folder) / "trace.json", calls=CALLS, **inputs)
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found: dict[int, list[float]] = defaultdict(list)
    call: dict[int, float] = {}
    for event in [*events, {"args": {"call": CALLS}}]:
        notes = event.get("args", {})
        if "call" in notes:
            for step, taken in call.items():
                found[step].append(taken)
            call = {}
        elif "step" in notes:
            call[notes["step"]] = call.get(notes["step"], 0.0) + event["dur"]
    return {step: median(times) for step, times in found.items()}


def _call_ratio(rules: Pipeline, whole: Pipeline, inputs: Mapping[str, Any]) -> float:
    times: list[list[float]] = [[], []]
    for turn in range(4 * ROUNDS):
        for which in (0, 1) if turn % 2 else (1, 0):
            pipe = (rules, whole)[which]
            pipe(**inputs)
            begin = perf_counter()
            for _ in range(CALLS):
                pipe(**inputs)
            times[which].append(perf_counter() - begin)
    return median(times[1]) / median(times[0])
