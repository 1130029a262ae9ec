"""Schedules that were measured instead of chosen by rule: the lock file beside a source.

`model.tuned.json` is written by `stagefuse compile model.pipe --tune` and read by every later
compilation of `model.pipe`. It names kernels by what the rules alone would make of them, so an
entry holds for each kernel with the same loops, wherever it stands, and for no other:

    {"format": 1, "measured": {...}, "targets": {
      "cpu": {"k_0f3c": {"tiles_per_block": 4}},
      "h200": {"p_93ab M 33..64": {"columns": 128, "cluster": 1}}}}

On GPUs an entry holds for the sizes that it names: those with the same power of two above them as
the sizes that were measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stagefuse.dsl.files import replace_file
from stagefuse.dsl.frozen import frozen

from .errors import PlanError
from .plan import TARGETS
from .schedule import Schedule

if TYPE_CHECKING:
    from .lower import Lowered
    from .plan import Plan

FORMAT = 1
MOST = 1 << 40
TUNABLE = frozenset(f.name for f in fields(Schedule) if f.type == "int")
STRUCTURE = frozenset(("rows", "columns", "split", "cluster", "parts", "warps"))
"""What an entry for a GPU says: see `compiler/gpu/structures.py`."""
Changes = Mapping[str, int]


class Choices(Protocol):
    """Who knows what to change in the schedule of a kernel, named as the rules make it."""

    def changes(self, target: str, kernel: str) -> Changes: ...

    def structures(
        self, arch: str, form: str, dims: Sequence[str], options: Options
    ) -> Sequence[Measured]:
        """What a product or an attention on a GPU is to be for some sizes; `dims` are those that
        it depends on."""


class Options(Protocol):
    """The structures that a kernel on a GPU may have, the few best at sizes first, or all."""

    def __call__(self, sizes: Mapping[str, int] | None) -> Sequence[Changes]: ...


@frozen
class Measured:
    """A structure measured on a device, for sizes within ranges."""

    device: str
    form: str
    ranges: tuple[tuple[str, int, int], ...]
    changes: Changes

    @property
    def name(self) -> str:
        """As the lock file has it."""
        return " ".join([self.form, *(f"{dim} {low}..{high}" for dim, low, high in self.ranges)])


def entry_of(device: str, name: str, changes: Changes) -> Measured:
    """An entry of the lock file. Raises ValueError for a name that is none."""
    match = re.fullmatch(r"(p_[0-9a-f]+)((?: \w+ \d+\.\.\d+)*)", name)
    if match is None:
        raise ValueError(f"{name!r} is no form with ranges of sizes, such as 'p_93ab M 33..64'")
    found = re.findall(r" (\w+) (\d+)\.\.(\d+)", match[2])
    return Measured(device, match[1], tuple((d, int(a), int(b)) for d, a, b in found), changes)


def around(size: int) -> tuple[int, int]:
    """The sizes that are taken for like this one: beyond the power of two below it."""
    high = 1 << max(size - 1, 0).bit_length() if size else 0
    return (high // 2 + 1 if high > 1 else high, high)


@frozen
class Tuned:
    """Changes by target and kernel; `measured` says on what they were measured."""

    targets: Mapping[str, Mapping[str, Changes]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def changes(self, target: str, kernel: str) -> Changes:
        return self.targets.get(target, {}).get(kernel, {})

    def structures(
        self, arch: str, form: str, dims: Sequence[str], options: Options
    ) -> Sequence[Measured]:
        return [
            entry
            for device in TARGETS if TARGETS[device] == arch
            for entry in self.entries(device) if entry.form == form
        ]  # fmt: skip

    def entries(self, device: str) -> list[Measured]:
        """Those for a GPU."""
        return [entry_of(device, n, c) for n, c in sorted(self.targets.get(device, {}).items())]


RULES = Tuned()
"""No changes: every schedule is what the rules say."""


@frozen
class Everywhere:
    """The same changes for every kernel of a target, as a trial."""

    target: str
    made: Changes

    def changes(self, target: str, kernel: str) -> Changes:
        return self.made if target == self.target else {}

    def structures(
        self, arch: str, form: str, dims: Sequence[str], options: Options
    ) -> Sequence[Measured]:
        return ()


def scheduled(
    lower: Callable[[Schedule], Lowered], base: Schedule, target: str, choices: Choices
) -> tuple[Lowered, Changes]:
    """What `lower` makes by the schedule chosen for it, and what that changes of `base`."""
    lowered = lower(base)
    changes = choices.changes(target, lowered.kernel.name)
    if not changes:
        return lowered, {}
    return lower(replace(base, **dict[str, Any](changes))), changes


def path_of(source: Path) -> Path:
    """Where the choices for a source lie."""
    return source.with_suffix(".tuned.json")


def beside(source: Path) -> Tuned:
    """The choices for a source, none where there is no lock file. Raises PlanError, OSError."""
    path = path_of(source)
    return read(path) if path.is_file() else RULES


def read(path: Path) -> Tuned:
    """The choices in a lock file. Raises PlanError for a file that is none, OSError."""
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"{path} does not hold choices of schedules: {error}\n"
            "  = help: delete it, or compile with --tune to measure again"
        ) from None


def _checked(found: Any) -> Tuned:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    targets, measured = found.get("targets"), found.get("measured", {})
    if not isinstance(targets, dict) or not isinstance(measured, dict):
        raise ValueError("`targets` and `measured` are objects")
    for target, kernels in targets.items():
        if not isinstance(kernels, dict):
            raise ValueError(f"target {target!r} is no object")
        for kernel, changes in kernels.items():
            gpu = TARGETS.get(target, "cpu") != "cpu"
            _check(f"kernel {kernel!r}", changes, STRUCTURE if gpu else TUNABLE)
            if gpu:
                entry_of(target, kernel, changes)
    return Tuned(targets, measured)


def _check(what: str, changes: Any, known: frozenset[str]) -> None:
    if not isinstance(changes, dict):
        raise ValueError(f"{what} is no object")
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{what}: schedules have no {name!r}")
        if type(value) is not int or not 1 <= value <= MOST:
            raise ValueError(f"{what}: {name} is a whole number from 1, not {value!r}")


def stale(tuned: Tuned, launches: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Notes on entries for GPUs that changed nothing in a plan of all pipelines, whose launches
    have these reports by arch."""
    notes = []
    for device, arch in TARGETS.items():
        if arch not in launches:
            continue
        for entry in tuned.entries(device):
            own = [r for r in launches[arch] if r.get("form") == entry.form]
            if not own:
                notes.append(f"{device}: {entry.name} is of a kernel that is no longer there")
            elif not any(r.get("tuned", {}).get("entry") == entry.name for r in own):
                notes.append(f"{device}: {entry.name} is not what its kernel can be, or not used")
    return notes


def stale_beside(source: Path, plan: Plan) -> list[str]:
    """Notes on entries of the lock file beside a source, for its plan of all pipelines."""
    reports: dict[str, list[Mapping[str, Any]]] = {}
    for pipeline in plan.pipelines:
        for gpu in pipeline.gpu:
            reports.setdefault(gpu.arch, []).extend(x.report for x in gpu.launches)
    return [f"{path_of(source)}: {note}" for note in stale(beside(source), reports)]


def write(tuned: Tuned, path: Path) -> None:
    """Writes a lock file, whole or not at all. Raises OSError."""
    content = {"format": FORMAT, "measured": tuned.measured, "targets": tuned.targets}
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))
