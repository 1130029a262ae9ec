"""Schedules that were measured instead of chosen by rule: the lock file beside a source.

`model.tuned.json` is written by `stagefuse compile model.pipe --tune` and read by every later
compilation of `model.pipe`. It names kernels by what the rules alone would make of them, so an
entry holds for each kernel with the same loops, wherever it stands, and for no other:

    {"format": 1, "measured": {...}, "targets": {"cpu": {"k_0f3c": {"tiles_per_block": 4}}}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stagefuse.dsl.files import replace_file

from .errors import PlanError
from .schedule import Schedule

if TYPE_CHECKING:
    from .lower import Lowered

FORMAT = 1
MOST = 1 << 40
TUNABLE = frozenset(f.name for f in fields(Schedule) if f.type == "int")
Changes = Mapping[str, int]


class Choices(Protocol):
    """Who knows what to change in the schedule of a kernel, named as the rules make it."""

    def changes(self, target: str, kernel: str) -> Changes: ...


@dataclass(frozen=True)
class Tuned:
    """Changes by target and kernel; `measured` says on what they were measured."""

    targets: Mapping[str, Mapping[str, Changes]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def changes(self, target: str, kernel: str) -> Changes:
        return self.targets.get(target, {}).get(kernel, {})


RULES = Tuned()
"""No changes: every schedule is what the rules say."""


@dataclass(frozen=True)
class Everywhere:
    """The same changes for every kernel of a target, as a trial."""

    target: str
    made: Changes

    def changes(self, target: str, kernel: str) -> Changes:
        return self.made if target == self.target else {}


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
            _check(f"kernel {kernel!r}", changes)
    return Tuned(targets, measured)


def _check(what: str, changes: Any) -> None:
    if not isinstance(changes, dict):
        raise ValueError(f"{what} is no object")
    for name, value in changes.items():
        if name not in TUNABLE:
            raise ValueError(f"{what}: schedules have no {name!r}")
        if type(value) is not int or not 1 <= value <= MOST:
            raise ValueError(f"{what}: {name} is a whole number from 1, not {value!r}")


def write(tuned: Tuned, path: Path) -> None:
    """Writes a lock file, whole or not at all. Raises OSError."""
    content = {"format": FORMAT, "measured": tuned.measured, "targets": tuned.targets}
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))
