"""`compile` and `load`: from a source or a plan file to a pipeline on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stagefuse.compiler import plan_check, plan_file
from stagefuse.compiler.plan import LEVELS, Plan

from . import native
from .devices import check_device, open_plan, require_code, targets_for, wants_gpu
from .errors import InputError, InternalError, PlanError
from .pipeline import Pipeline


def load(
    path: str | Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    pipeline: str | None = None,
    verify: bool = False,
) -> Pipeline:
    """The pipeline of a plan file, ready to call; its weights are mapped, not read.

    `device` is "cpu", "cuda:0" and on, or "emulator"; without it, this machine's first GPU that
    the plan has code for, or else its CPU. `pipeline` chooses one of several. `verify` checks the
    hash of the weights too.
    A plan is machine code: load only files that you would run.

    Raises PlanError, DeviceError, InputError, OSError; TypeError for what is no path.
    """
    device = check_device(device)
    gpu = wants_gpu(device, threads)
    path = _path_of(path)
    if path.suffix == ".pipe" and path.is_file():
        advice = f"compile it: `stagefuse.compile({str(path)!r})`"
        raise PlanError(f"{path} is a source, not a plan\n  = help: {advice}")
    plan = plan_file.read(path, verify=verify, gpu=gpu)
    return open_plan(plan, pipeline, device, threads)


def _path_of(given: str | Path) -> Path:
    """The path of a file that exists or not. Raises TypeError, InputError for no path at all."""
    path = Path(given)
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} is the name of no file: it has a null byte")
    return path


def compile(
    source: str | Path,
    *,
    target: str | None = None,
    device: str | None = None,
    weights: Mapping[str, Any] | None = None,
    pipeline: str | None = None,
    threads: int | None = None,
) -> Pipeline:
    """The pipeline of a `.pipe` file, or of its text, ready to call.

    A string with a line break is the text itself. `target` lists what to make code for, such as
    "h200,cpu"; without it, that is what `device` needs. `weights` gives files or arrays by name
    instead of what the source names; such arrays may change afterwards. `pipeline` chooses one of
    several. Entries of the lock file that no longer fit are warnings.

    Raises CompileError, DeviceError, InputError, OSError; PlanError for a file that is compiled
    already, TypeError for weights of another kind and for what is no path.
    """
    targets = targets_for(target, device)
    from stagefuse.compiler import driver

    if isinstance(source, str) and "\n" in source:
        plan = _compiled_text(source, weights or {}, pipeline, targets)
    else:
        plan = driver.compile_file(
            _path_of(source), targets=targets, weights=weights, pipeline=pipeline,
            levels=host_levels(),
        )  # fmt: skip
        if pipeline is None and plan.ptx:
            _warn_of_what_is_stale(Path(source), plan)
    if not plan.pipelines:
        called = "" if pipeline is None else f" called {pipeline!r}"
        raise InputError(f"the source has no pipeline{called}")
    try:
        plan_check.check(plan)
    except PlanError as error:
        raise InternalError(f"the compiler made a plan that breaks its rules: {error}") from error
    require_code(plan, targets)
    return open_plan(_apart_from(weights or {}, plan), pipeline, device, threads)


def _apart_from(weights: Mapping[str, Any], plan: Plan) -> Plan:
    """The plan, whose arrays are none that the caller can write to: others were made of them."""
    found = (x for given in weights.values() if isinstance(given, Mapping) for x in given.values())
    given = [x for x in map(np.asarray, found) if x.flags.writeable]
    shared = {
        name: array.copy()
        for name, array in plan.arrays.items()
        if any(np.may_share_memory(array, x) for x in given)
    }
    return replace(plan, arrays={**plan.arrays, **shared})


def _compiled_text(
    text: str, weights: Mapping[str, Any], pipeline: str | None, targets: tuple[str, ...]
) -> Plan:
    """The plan of a text; what it imports and its weights are looked for in this folder."""
    from stagefuse.compiler import driver, front
    from stagefuse.dsl.diagnostics import CompileError
    from stagefuse.dsl.source import Source

    program, found, load = front.check_text(Source("<text>", text), Path.cwd(), weights)
    if found:
        raise CompileError(found)
    return driver.compile_program(
        program, load, pipeline, levels=host_levels(), targets=targets
    )


def _warn_of_what_is_stale(source: Path, plan: Plan) -> None:
    """Warn of entries of the lock file that changed nothing in a plan of all pipelines."""
    from stagefuse.compiler import tuned

    for note in tuned.stale_beside(source, plan):
        warnings.warn(note, stacklevel=3)


def host_levels() -> tuple[str, ...]:
    """The one level of code that this machine would choose; all of them if it could run none."""
    level = native.detect_level()
    return (level,) if level in LEVELS else LEVELS
