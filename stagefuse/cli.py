"""The command line. Results go to stdout, everything else to stderr.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__, cli_exit

if TYPE_CHECKING:
    from stagefuse.compiler.plan import Plan
    from stagefuse.runtime.pipeline import Pipeline

FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
WEIGHTS = click.option(
    "--weights", multiple=True, metavar="NAME=PATH", help="Another file for weights NAME."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
PIPELINE = click.option("--pipeline", metavar="NAME", help="Which one, if there are several.")
THREADS = click.option("--threads", type=click.IntRange(1, 64), help="As many threads at most.")


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    gc.set_threshold(100_000)  # a command allocates much, frees little and ends soon: a tenth less
    sys.exit(cli_exit.guarded(lambda: run_command(arguments), arguments))


def run_command(arguments: Sequence[str]) -> Any:
    """Run one command; errors come out as exceptions."""
    return commands.main(list(arguments), prog_name="stagefuse", standalone_mode=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stagefuse")
def commands() -> None:
    """Compile, check and run model pipelines written in .pipe files."""


@commands.command("compile")
@FILE
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="Comma-separated.")
@click.option("--no-verify", is_flag=True, help="Don't check the graph after each pass.")
@WEIGHTS
@PIPELINE
@JSON
def compile_command(
    file: Path,
    output: Path | None,
    target: str,
    no_verify: bool,
    weights: tuple[str, ...],
    pipeline: str | None,
    as_json: bool,
) -> None:
    """Compile FILE to a .fused file."""
    output = output or file.with_suffix(".fused")
    started = time.perf_counter()
    with reported(as_json):
        plan = compiled(file, weights, target, pipeline, verify=not no_verify)
        from stagefuse.compiler import plan_file

        plan_file.write(plan, output)
    seconds = time.perf_counter() - started
    size = output.stat().st_size
    if as_json:
        from stagefuse.runtime.signature import of_plan

        pipelines = [
            {"name": p.name, "signature": str(of_plan(p)), "kernels": len(p.steps)}
            for p in plan.pipelines
        ]
        show_json(output=str(output), bytes=size, seconds=seconds, pipelines=pipelines)
        return
    for entry in plan.pipelines:
        kernels = "1 kernel" if len(entry.steps) == 1 else f"{len(entry.steps)} kernels"
        click.echo(f"{entry.name}: {kernels}")
    click.echo(f"{output}: {size / 1e6:.1f} MB, {seconds:.2f} s")


@commands.command()
@FILE
@WEIGHTS
@JSON
def check(file: Path, weights: tuple[str, ...], as_json: bool) -> None:
    """Check FILE: syntax, types, shapes and weights."""
    with reported(as_json), working(f"checking {file}"):
        from stagefuse.compiler import driver
        from stagefuse.dsl.diagnostics import CompileError, render_all, to_json

        program, diagnostics = driver.check_file(file, named_weights(weights))
        if program is None or any(d.severity == "error" for d in diagnostics):
            raise CompileError(diagnostics)
    names = [p.name for p in program.pipelines]
    if as_json:
        show_json(pipelines=names, diagnostics=[to_json(d) for d in diagnostics])
        return
    if diagnostics:
        click.echo(render_all(diagnostics), err=True)
    click.echo(f"{file}: {', '.join(names) if names else 'no pipelines'}: ok")


@commands.command()
@FILE
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE.npy", help="Each input.")
@click.option("-o", "--output-dir", type=click.Path(file_okay=False, path_type=Path))
@WEIGHTS
@PIPELINE
@THREADS
@JSON
def run(
    file: Path,
    inputs: tuple[str, ...],
    output_dir: Path | None,
    weights: tuple[str, ...],
    pipeline: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run FILE (.pipe or .fused) on arrays from .npy files.

    With --output-dir every result becomes a .npy file there; without, results are printed.
    """
    with reported(as_json):
        import numpy as np

        pipe = opened(file, weights, pipeline, threads)
        found = pipe(**read_inputs(inputs))
        arguments = pipe.signature.results
        arrays = [found] if len(arguments) == 1 else list(found)
        names = [a.name or ("result" if len(arrays) == 1 else f"result{i}")
                 for i, a in enumerate(arguments)]  # fmt: skip
        paths: dict[str, str] = {}
        if output_dir is not None:
            output_dir.mkdir(parents=True, exist_ok=True)
            for name, array in zip(names, arrays, strict=True):
                paths[name] = str(output_dir / f"{name}.npy")
                np.save(paths[name], array)
    if as_json:
        show_json(results=[
            {"name": name, "type": argument.dtype, "shape": list(array.shape),
             **({"file": paths[name]} if name in paths else {"values": array.tolist()})}
            for name, argument, array in zip(names, arguments, arrays, strict=True)
        ])  # fmt: skip
        return
    for name, argument, array in zip(names, arguments, arrays, strict=True):
        click.echo(f"{name}: {argument.dtype}{list(array.shape)}")
        click.echo(f"  {paths[name]}" if name in paths else np.array2string(array, threshold=60))


def list_passes(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Prints the passes and ends the command."""
    if not wanted or context.resilient_parsing:
        return
    from stagefuse.compiler import stages

    for step in stages.passes():
        first = (type(step).__doc__ or "").partition("\n")[0]
        click.echo(f"{step.name:<18}{first}")
        for label, names in (("requires", step.requires), ("establishes", step.establishes)):
            if names:
                click.echo(f"{'':<18}  {label} {', '.join(names)}")
    context.exit()


@commands.command()
@FILE
@click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="A dimension, as B=8.")
@click.option(
    "--ir", metavar="STAGE", help="Print the text after a stage: graph, a pass, or kernels."
)
@click.option(
    "--passes", is_flag=True, is_eager=True, expose_value=False, callback=list_passes,
    help="List the passes in order, and exit.",
)  # fmt: skip
@WEIGHTS
@PIPELINE
@JSON
def explain(
    file: Path,
    sizes: tuple[str, ...],
    ir: str | None,
    weights: tuple[str, ...],
    pipeline: str | None,
    as_json: bool,
) -> None:
    """Show the kernels of FILE (.pipe or .fused): what each fuses, and why.

    With sizes, also the bytes and operations of each.
    """
    if ir is not None:
        return explain_ir(file, ir, weights, pipeline, as_json)
    with reported(as_json):
        plan = compiled(file, weights, "cpu", pipeline)
        from dataclasses import asdict

        from stagefuse.runtime.report import Report

        levels = "/".join(plan.objects) or "none"
        chosen = [p for p in plan.pipelines if pipeline in (None, p.name)]
        reports = [Report.of_plan(p, levels) for p in chosen]
    if as_json:
        show_json(pipelines=[asdict(r) for r in reports])
        return
    from rich.console import Console

    from . import tables

    numbers = whole_numbers(sizes) if sizes else None
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for report, entry in zip(reports, chosen, strict=True):
        if numbers is not None:
            require_sizes([d.name for d in entry.dims], numbers)
        console.print(report.signature, markup=False, style="bold")
        console.print(tables.table(report, numbers))
        console.print()
        for line in tables.reasons(report):
            console.print(line, markup=False, soft_wrap=True)


def explain_ir(
    file: Path, stage: str, weights: tuple[str, ...], pipeline: str | None, as_json: bool
) -> None:
    """Prints the text of the IR after a stage."""
    from stagefuse.compiler import stages

    if stage not in stages.names():
        known = ", ".join(stages.names())
        raise click.UsageError(f"--ir: there is no stage {stage!r}; there is {known}")
    if is_plan(file):
        raise click.UsageError("--ir is for sources; a .fused file holds machine code")
    with reported(as_json), working(f"compiling {file}"):
        texts = stages.text_after(file, stage, named_weights(weights), pipeline)
    if as_json:
        return show_json(pipelines=[{"name": name, "ir": text} for name, text in texts])
    click.echo("\n".join(text for _, text in texts), nl=False)


@commands.command()
@FILE
@click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="A dimension, as B=8.")
@click.option("--calls", type=click.IntRange(1), default=100, show_default=True)
@WEIGHTS
@PIPELINE
@THREADS
@JSON
def bench(
    file: Path,
    sizes: tuple[str, ...],
    calls: int,
    weights: tuple[str, ...],
    pipeline: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time calls of FILE (.pipe or .fused) with made-up inputs of the given sizes."""
    with reported(as_json):
        pipe = opened(file, weights, pipeline, threads)
        inputs = example_inputs(pipe, sizes)
        pipe(**inputs)
        times = []
        for _ in range(calls):
            started = time.perf_counter()
            pipe(**inputs)
            times.append(time.perf_counter() - started)
    times.sort()
    median, low, high = times[len(times) // 2], times[0], times[-1]
    if as_json:
        show_json(calls=calls, threads=pipe.threads, median_s=median, min_s=low, max_s=high)
        return
    click.echo(f"{pipe.signature}")
    click.echo(
        f"{calls} calls on {pipe.threads} threads: median {median * 1e6:.1f} us, "
        f"{low * 1e6:.1f} to {high * 1e6:.1f} us"
    )


@commands.command()
@JSON
def doctor(as_json: bool) -> int:
    """Say what this machine has and what will run on it."""
    from . import doctor as examination

    findings = examination.examine()
    if as_json:
        click.echo(json.dumps(examination.as_json(findings), indent=2))
    else:
        width = max(len(f.name) for f in findings)
        for finding in findings:
            mark = "ok" if finding.works else "MISSING"
            click.echo(f"{mark:<8}{finding.name:<{width}}  {finding.found}")
            if finding.help:
                click.echo(f"{'':<8}{'':<{width}}  = help: {finding.help}")
    return cli_exit.DONE if all(f.works for f in findings) else cli_exit.MISSING


# What the commands share


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Errors within become JSON on stdout where the caller asked for JSON."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except Exception as error:
        if as_json:
            raise cli_exit.AsJson(error) from error
        raise


@contextmanager
def working(text: str) -> Iterator[None]:
    """On a terminal, a spinner with the time that passes, once a second has passed."""
    if not sys.stderr.isatty():
        yield
        return
    stop = threading.Event()

    def spin() -> None:
        if stop.wait(1.0):
            return
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            progress.add_task(text, total=None)
            stop.wait()

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def show_json(**values: Any) -> None:
    click.echo(json.dumps({"ok": True, **values}, indent=2))


def pairs(options: Sequence[str], what: str) -> dict[str, str]:
    """NAME=VALUE options by name."""
    found: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name or not value:
            raise click.UsageError(f"{what} takes NAME=VALUE, not {option!r}")
        if name in found:
            raise click.UsageError(f"{what} gives {name!r} twice")
        found[name] = value
    return found


def named_weights(options: Sequence[str]) -> dict[str, Any]:
    return {name: Path(path) for name, path in pairs(options, "--weights").items()}


def is_plan(file: Path) -> bool:
    """Whether the file is a compiled one, by its first bytes: a zip archive."""
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def compiled(
    file: Path, weights: Sequence[str], target: str, pipeline: str | None, verify: bool = True
) -> Plan:
    """The plan of a source file, or the plan that the file is."""
    if is_plan(file):
        if weights:
            raise click.UsageError("--weights is for sources; a .fused file holds its weights")
        from stagefuse.compiler import plan_file

        return plan_file.read(file)
    from stagefuse.runtime.devices import check_target, require_code

    targets = check_target(target)
    with working(f"compiling {file}"):
        from stagefuse.compiler import driver

        plan = driver.compile_file(
            file, targets=targets, weights=named_weights(weights), pipeline=pipeline,
            verify=verify,
        )  # fmt: skip
    require_code(plan, targets)
    return plan


def opened(
    file: Path, weights: Sequence[str], pipeline: str | None, threads: int | None
) -> Pipeline:
    """The pipeline of a source or a plan, ready to call."""
    plan = compiled(file, weights, "cpu", pipeline)
    from stagefuse.runtime.devices import open_plan

    return open_plan(plan, pipeline, "cpu", threads)


def read_inputs(options: Sequence[str]) -> dict[str, Any]:
    """Arrays by input name; a bare path names the input that is called like the file."""
    import numpy as np

    named = [o if "=" in o else f"{Path(o).stem}={o}" for o in options]
    found: dict[str, Any] = {}
    for name, path in pairs(named, "--input").items():
        if not Path(path).is_file():
            raise click.UsageError(f"--input {name}: there is no file {path!r}")
        try:
            found[name] = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise click.UsageError(f"--input {name}: {path!r} is no .npy file: {error}") from error
    return found


def whole_numbers(options: Sequence[str]) -> dict[str, int]:
    """The --size options by name."""
    sizes: dict[str, int] = {}
    for name, text in pairs(options, "--size").items():
        if not text.isdigit():
            raise click.UsageError(f"--size {name} takes a whole number, not {text!r}")
        sizes[name] = int(text)
    return sizes


def require_sizes(known: Sequence[str], sizes: dict[str, int]) -> None:
    """Refuse sizes that the pipeline does not have, or that are missing."""
    for name in sizes:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise click.UsageError(f"no dimension is called {name!r}; there is {listed}")
    missing = [name for name in known if name not in sizes]
    if missing:
        raise click.UsageError("give " + " and ".join(f"--size {name}=N" for name in missing))


def example_inputs(pipe: Pipeline, options: Sequence[str]) -> dict[str, Any]:
    """Made-up inputs with the given sizes; every dimension must be given."""
    from stagefuse.runtime.pipeline import example_inputs as invented

    sizes = whole_numbers(options)
    require_sizes([name for name, _, _ in pipe.signature.ranges], sizes)
    return invented(pipe._plan, sizes)
