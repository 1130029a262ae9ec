"""`stagefuse compile --tune`: measures, and writes the lock file beside the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_shared import example_inputs, named_weights, whole_numbers

if TYPE_CHECKING:
    from stagefuse.compiler.tuned import Choices

    from .tune import Found


def tuned_first(
    file: Path,
    weights: Sequence[str],
    pipeline: str | None,
    sizes: Sequence[str],
    threads: int | None,
    quiet: bool,
    target: str = "cpu",
) -> None:
    """Measures schedules for one pipeline of a source and writes the lock file.

    What the file held for other kernels, and for targets that are not measured, stays in it.
    """
    from stagefuse.compiler import tuned as lock
    from stagefuse.compiler.front import check_source
    from stagefuse.dsl.diagnostics import CompileError

    devices = _devices(target)
    program, found, load = check_source(file, named_weights(weights))
    if found:
        raise CompileError(found)

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    for name, device in devices.items():
        result = _tuned(name, device, (program, load, pipeline), sizes, threads, say)
        before = lock.beside(file).targets
        kept = {**before.get(name, {}), **result.tuned.targets.get(name, {})}
        targets = {**before, name: kept}
        content = lock.Tuned({n: k for n, k in targets.items() if k}, result.tuned.measured)
        lock.write(content, lock.path_of(file))
        for gain in result.gains:
            changed = ", ".join(f"{n} = {value}" for n, value in gain.changes.items())
            say(f"{gain.label}: {changed}, {gain.ratio:.2f} of the time by the rules")
        what = "whole calls" if name == "cpu" else "these kernels on " + name
        say(f"{lock.path_of(file)}: {what} take {result.ratio:.2f} of it")


def _devices(target: str) -> dict[str, str]:
    """The devices of this machine that are targets. Raises DeviceError for a GPU that is not
    here."""
    from stagefuse.compiler.plan import TARGETS
    from stagefuse.runtime.cuda import found
    from stagefuse.runtime.devices import check_target
    from stagefuse.runtime.errors import DeviceError

    check_target(target)
    devices: dict[str, str] = {}
    for name in filter(None, (t.strip() for t in target.split(","))):
        if name == "cpu":
            devices[name] = name
            continue
        if name not in TARGETS:
            raise click.UsageError(f"--tune takes the name of a GPU, not {name}")
        gpu = found.of_target(name) if found.has_driver() else None
        if gpu is None:
            raise DeviceError(
                f"there is no {name} here to measure on\n"
                "  = help: --tune measures on this machine; compile for others without it"
            )
        devices[name] = f"cuda:{gpu.number}"
    return devices


def _tuned(
    name: str,
    device: str,
    source: tuple[Any, Any, str | None],
    sizes: Sequence[str],
    threads: int | None,
    say: Callable[[str], None],
) -> Found:
    """What is best for a target, measured on a device."""
    from stagefuse import __version__
    from stagefuse.compiler import tuned as lock
    from stagefuse.compiler.driver import compile_program
    from stagefuse.runtime.api import host_levels
    from stagefuse.runtime.devices import open_plan

    from .tune import tune
    from .tune_device import tune_device

    program, load, pipeline = source
    cpu = name == "cpu"

    def opened(choices: Choices) -> Any:
        plan = compile_program(
            program, load, pipeline, levels=host_levels(), targets=[name], choices=choices
        )
        return open_plan(plan, pipeline, device, threads if cpu else None)

    with opened(lock.RULES) as pipe:
        if pipe.signature.states:
            raise click.UsageError("--tune is for pipelines that keep no states")
        inputs = example_inputs(pipe, sizes)
        measured = {"stagefuse": __version__, "sizes": whole_numbers(sizes)}
        if cpu:
            measured |= {"level": pipe.report().level, "threads": pipe.threads}
        else:
            measured |= {"device": name}

    def trying(text: str) -> None:
        say(f"trying {text}")

    if cpu:
        return tune(opened, inputs, measured, trying)
    return tune_device(opened, inputs, name, whole_numbers(sizes), measured, trying)
