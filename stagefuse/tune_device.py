"""Structures by measurement on a GPU: `stagefuse compile model.pipe --tune --target h200`.

The pipeline is compiled by the rules, and then with the first structure that each product and
attention could have besides, the second, and so on. Results are compared with the rules'; then both
take turns, each form of kernel timed by the device's clock. A form keeps what gained most, and in
the end calls with all that is kept are compared in the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from stagefuse.compiler.plan import TARGETS
from stagefuse.compiler.tuned import RULES, Changes, Choices, Measured, Options, Tuned, around
from stagefuse.runtime.device_pipeline import DevicePipeline
from stagefuse.runtime.device_timing import Timer

from .tune import GAIN, ROUNDS, Found, Gain, _close, _listed

if TYPE_CHECKING:
    from stagefuse.runtime.pipeline import Pipeline

MOST_TRIALS = 12


@dataclass
class Trial:
    """The structure number `number` of every form that has so many, for sizes on a device. `given`
    is what it was, by form."""

    device: str
    sizes: Mapping[str, int]
    number: int
    given: dict[str, Measured] = field(default_factory=dict)

    def changes(self, target: str, kernel: str) -> Changes:
        return {}

    def structures(
        self, arch: str, form: str, dims: Sequence[str], options: Options
    ) -> Sequence[Measured]:
        listed = options(self.sizes) if arch == TARGETS[self.device] else ()
        if self.number >= len(listed):
            return ()
        ranges = tuple((d, *around(self.sizes[d])) for d in dims if d in self.sizes)
        found = Measured(self.device, form, ranges, listed[self.number])
        self.given[form] = found
        return (found,)


def tune_device(
    opened: Callable[[Choices], Pipeline],
    inputs: Mapping[str, Any],
    device: str,
    sizes: Mapping[str, int],
    measured: Mapping[str, Any],
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    """The structures that are quickest for these inputs on a GPU of this name; `opened` gives the
    pipeline compiled by choices, on that GPU."""
    best: dict[str, tuple[float, Measured, str]] = {}
    with opened(RULES) as rules:
        expected = _listed(rules(**inputs))
        labels = _labels(rules)
        for number in range(MOST_TRIALS):
            trial = Trial(device, sizes, number)
            with opened(trial) as pipe:
                if not trial.given:
                    break
                say(f"structure {number + 1} of {len(trial.given)} kernels")
                if not _close(pipe, inputs, expected):
                    continue
                for form, ratio in _ratios(rules, pipe, inputs).items():
                    least = best[form][0] if form in best else 1.0
                    if form in trial.given and ratio < min(1 - GAIN, least):
                        best[form] = (ratio, trial.given[form], labels.get(form, form))
        kept = {entry.name: entry.changes for _, entry, _ in best.values()}
        tuned = Tuned({device: kept}, measured)
        if not kept:
            return Found(Tuned({}, measured), (), 1.0)
        with opened(tuned) as whole:
            if not _close(whole, inputs, expected):
                return Found(Tuned({}, measured), (), 1.0)
            times = _both(rules, whole, inputs)
    ratio = sum(map(median, times[1].values())) / sum(map(median, times[0].values()))
    if ratio >= 1:
        return Found(Tuned({}, measured), (), 1.0)
    gains = tuple(
        Gain(entry.name, label, entry.changes, ratio)
        for ratio, entry, label in sorted(best.values(), key=lambda x: (x[0], x[1].name))
    )
    return Found(tuned, gains, ratio)


def _labels(pipe: Pipeline) -> dict[str, str]:
    """Where in the source kernels come from, by form."""
    assert isinstance(pipe, DevicePipeline)
    found: dict[str, str] = {}
    for launch in pipe._gpu.launches:
        found.setdefault(str(launch.report.get("form", "")), launch.label)
    return found


def _ratios(
    rules: Pipeline, trial: Pipeline, inputs: Mapping[str, Any]
) -> dict[str, float]:
    """Each form's time in a trial over that by the rules."""
    old, new = ({f: median(t) for f, t in x.items()} for x in _both(rules, trial, inputs))
    return {form: new[form] / time for form, time in old.items() if time > 0 and form in new}


def _both(
    rules: Pipeline, trial: Pipeline, inputs: Mapping[str, Any]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The times of each form in calls of both, which take turns; the first call is no measure."""
    both: tuple[dict[str, list[float]], dict[str, list[float]]]
    both = defaultdict(list), defaultdict(list)
    assert isinstance(rules, DevicePipeline) and isinstance(trial, DevicePipeline)
    with Timer(rules, inputs) as one, Timer(trial, inputs) as other:
        for turn in range(2 * ROUNDS + 1):
            order = [(one, both[0]), (other, both[1])]
            for timer, times in order if turn % 2 else order[::-1]:
                for form, taken in timer.times().items():
                    if turn:
                        times[form].append(taken)
    return both
