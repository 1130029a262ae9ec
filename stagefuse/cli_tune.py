"""`stagefuse compile --tune`: measures, and writes the lock file beside the source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_shared import example_inputs, named_weights, whole_numbers

if TYPE_CHECKING:
    from stagefuse.compiler.tuned import Choices
    from stagefuse.runtime.pipeline import Pipeline


def tuned_first(
    file: Path,
    weights: Sequence[str],
    pipeline: str | None,
    sizes: Sequence[str],
    threads: int | None,
    quiet: bool,
) -> None:
    """Measures schedules for one pipeline of a source and writes the lock file.

    What the file held for other kernels stays in it.
    """
    from stagefuse import __version__
    from stagefuse.compiler import tuned as lock
    from stagefuse.compiler.driver import compile_program
    from stagefuse.compiler.front import check_source
    from stagefuse.dsl.diagnostics import CompileError
    from stagefuse.runtime.api import host_levels
    from stagefuse.runtime.devices import open_plan

    from .tune import TARGET, tune

    program, found, load = check_source(file, named_weights(weights))
    if found:
        raise CompileError(found)
    before = lock.beside(file)

    def opened(choices: Choices) -> Pipeline:
        plan = compile_program(program, load, pipeline, levels=host_levels(), choices=choices)
        return open_plan(plan, pipeline, "cpu", threads)

    with opened(lock.RULES) as pipe:
        if pipe.signature.states:
            raise click.UsageError("--tune is for pipelines that keep no states")
        inputs = example_inputs(pipe, sizes)
        used, level = pipe.threads, pipe.report().level
    measured = {
        "stagefuse": __version__, "level": level, "threads": used, "sizes": whole_numbers(sizes),
    }  # fmt: skip

    def say(text: str) -> None:
        if not quiet:
            click.echo(f"trying {text}", err=True)

    result = tune(opened, inputs, measured, say)
    kept = {**before.targets.get(TARGET, {}), **result.tuned.targets.get(TARGET, {})}
    lock.write(lock.Tuned({TARGET: kept} if kept else {}, measured), lock.path_of(file))
    if quiet:
        return
    for gain in result.gains:
        changed = ", ".join(f"{name} = {value}" for name, value in gain.changes.items())
        click.echo(f"{gain.label}: {changed}, {gain.ratio:.2f} of the time by the rules", err=True)
    click.echo(f"{lock.path_of(file)}: whole calls take {result.ratio:.2f} of it", err=True)
