"""The command line. Results go to stdout, everything else to stderr.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import gc
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__, cli_emulate, cli_exit, cli_fmt, cli_onnx
from .cli_shared import (
    DEVICE,
    FILE,
    INPUTS,
    JSON,
    OUTPUT_DIR,
    PIPELINE,
    SIZES,
    THREADS,
    WEIGHTS,
    compiled,
    example_inputs,
    is_plan,
    named_weights,
    opened,
    read_inputs,
    require_output,
    require_source,
    show_json,
    show_results,
    sizes_of_each,
    working,
)
from .cli_states import STATE_IN, STATE_OUT, called, example_call
from .cli_tune import tuned_first


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and sources may hold anything
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.setswitchinterval(0.0002)  # threads that feed ptxas need little, and often
    gc.set_threshold(1_000_000)  # a command allocates much, frees little and ends soon
    code = cli_exit.guarded(lambda: run_command(arguments), arguments)
    gc.freeze()  # the collector's last walks, over all that a compilation made, would free nothing
    sys.exit(code)


def run_command(arguments: Sequence[str]) -> Any:
    """Run one command; errors come out as exceptions."""
    return commands.main(list(arguments), prog_name="stagefuse", standalone_mode=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stagefuse")
def commands() -> None:
    """Compile, check and run model pipelines written in .pipe files.

    \b
    stagefuse check model.pipe
    stagefuse compile model.pipe -o model.fused
    stagefuse run model.fused --input ids=ids.npy --output-dir results

    Results go to stdout, diagnostics and progress to stderr. Exit codes: 0 done, 1 a wrong program
    or input, 2 wrong usage, 3 something missing on this machine, 70 a fault of stagefuse itself.
    """


commands.add_command(cli_emulate.emulate)
commands.add_command(cli_fmt.fmt)
commands.add_command(cli_onnx.import_command)
commands.add_command(cli_onnx.export_command)


@commands.command("compile", short_help="Compile FILE to a .fused file.")
@FILE
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write it; without, beside FILE with the ending .fused.",
)
@click.option(
    "--target", default="cpu", show_default=True,
    help="What to make code for, comma-separated: cpu, a100, l20, l40, h100, h200, h20.",
)
@click.option("--no-verify", is_flag=True, help="Don't check the graph after each pass.")
@click.option(
    "--tune", is_flag=True,
    help="Measure schedules for the targets on this machine first, its CPU or its GPU, with the "
    "sizes of --size, and write the fastest to FILE's lock file (.tuned.json), which every "
    "compilation reads.",
)
@SIZES
@THREADS
@WEIGHTS
@PIPELINE
@JSON
def compile_command(
    file: Path,
    output: Path | None,
    target: str,
    no_verify: bool,
    tune: bool,
    sizes: tuple[str, ...],
    threads: int | None,
    weights: tuple[str, ...],
    pipeline: str | None,
    as_json: bool,
) -> None:
    """Compile FILE to a .fused file: machine code, plan and weights. Needs no GPU.

    \b
    stagefuse compile model.pipe -o model.fused
    stagefuse compile model.pipe --target h200,a100,cpu --weights w=other.safetensors
    stagefuse compile model.pipe --tune --size B=8 --size T=128
    stagefuse compile model.pipe --tune --size B=8 --size T=128 --target h200
    """
    require_source(file, "compile")
    output = output or file.with_suffix(".fused")
    require_output(output, ".fused", file)
    for option, value in (("--size", sizes), ("--threads", threads)):
        if value and not tune:
            raise click.UsageError(f"{option} is for --tune")
    if tune:
        tuned_first(file, weights, pipeline, sizes, threads, as_json, target)
    started = time.perf_counter()
    from stagefuse.compiler.plan_writing import Writing

    plan = compiled(file, weights, target, pipeline, verify=not no_verify, write=Writing(output))
    seconds = time.perf_counter() - started
    size = output.stat().st_size
    if as_json:
        from stagefuse.runtime.signature import of_plan

        pipelines = [
            {"name": p.name, "signature": str(of_plan(p)), "kernels": len(p.steps),
             "gpu": {g.arch: len(g.launches) for g in p.gpu}}
            for p in plan.pipelines
        ]
        show_json(output=str(output), bytes=size, seconds=seconds, pipelines=pipelines)
        return
    for entry in plan.pipelines:
        counts = [(len(entry.steps), "")] if plan.objects or not entry.gpu else []
        counts += [(len(g.launches), f" on {g.arch}") for g in entry.gpu]
        said = [f"{n} kernel{'s' * (n != 1)}{where}" for n, where in counts]
        click.echo(f"{entry.name}: {', '.join(said)}")
    click.echo(f"{output}: {size / 1e6:.1f} MB, {seconds:.2f} s")


@commands.command()
@FILE
@WEIGHTS
@JSON
def check(file: Path, weights: tuple[str, ...], as_json: bool) -> None:
    """Check FILE: syntax, types, shapes and weights.

    Every independent error of the file is shown, those of its syntax first; exit code 1 if there is
    one. With --json, diagnostics have their place, code, notes and help as fields.

    \b
    stagefuse check model.pipe
    """
    require_source(file, "check")
    with working(f"checking {file}"):
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
@INPUTS
@OUTPUT_DIR
@SIZES
@STATE_IN
@STATE_OUT
@WEIGHTS
@PIPELINE
@DEVICE
@THREADS
@JSON
def run(
    file: Path,
    inputs: tuple[str, ...],
    output_dir: Path | None,
    sizes: tuple[str, ...],
    state_in: Path | None,
    state_out: Path | None,
    weights: tuple[str, ...],
    pipeline: str | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run FILE (.pipe or .fused) on arrays from .npy files.

    With --output-dir every result becomes a .npy file there; without, results are printed.
    A pipeline that keeps states needs the sizes in their shapes, or the states of a call before.

    \b
    stagefuse run model.fused --input ids=ids.npy --input mask=mask.npy
    stagefuse run model.pipe --input x.npy --output-dir results
    stagefuse run decoder.fused --size S=1024 --input tokens.npy --state-out talk.npz
    """
    with opened(file, weights, pipeline, threads, device) as pipe:
        arrays = read_inputs(inputs, pipe)
        found = called(pipe, arrays, sizes, state_in, state_out)
        show_results(pipe, found, output_dir, as_json)


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


@commands.command(short_help="Show the kernels of FILE, and why.")
@FILE
@SIZES
@click.option(
    "--ir", metavar="STAGE",
    help="Print the text after a stage: graph, a pass, or kernels or ptx (of --target).",
)
@click.option(
    "--passes", is_flag=True, is_eager=True, expose_value=False, callback=list_passes,
    help="List the passes in order, and exit.",
)  # fmt: skip
@click.option(
    "--target", default="cpu", show_default=True,
    help="What to show of a source, comma-separated; of a .fused file all is shown.",
)
@WEIGHTS
@PIPELINE
@JSON
def explain(
    file: Path,
    sizes: tuple[str, ...],
    ir: str | None,
    target: str,
    weights: tuple[str, ...],
    pipeline: str | None,
    as_json: bool,
) -> None:
    """Show the kernels of FILE (.pipe or .fused): what each fuses, and why.

    Bytes and operations are those at the sizes given, or else at the largest. Of code for GPUs also
    registers, shared memory, occupancy, and the time predicted for each device, with its bound.

    \b
    stagefuse explain model.fused --size B=8 --size T=128
    stagefuse explain model.pipe --ir graph
    """
    if ir == "ptx":
        return explain_ptx(file, target, weights, pipeline, as_json)
    if ir is not None:
        return explain_ir(file, ir, target, weights, pipeline, as_json)
    from dataclasses import asdict

    from stagefuse.compiler.gpu.predict import largest
    from stagefuse.runtime.report import Report

    plan = compiled(file, weights, target, pipeline)
    levels = "/".join(plan.objects)
    chosen = [p for p in plan.pipelines if pipeline in (None, p.name)]
    given = sizes_of_each(chosen, sizes)
    at = {p.name: given[p.name] or largest(p.dims) for p in chosen}
    found = [(Report.of_plan(p, levels), at[p.name]) for p in chosen if levels or not p.gpu]
    found += [(Report.of_gpu(p, g, at[p.name]), at[p.name]) for p in chosen for g in p.gpu]
    if as_json:
        show_json(pipelines=[asdict(r) for r, _ in found])
        return
    from . import tables

    for report, numbers in found:
        tables.show(report, numbers)


def explain_ptx(
    file: Path, target: str, weights: tuple[str, ...], pipeline: str | None, as_json: bool
) -> None:
    """Prints the PTX for each GPU of the targets, or that a .fused file holds."""
    plan = compiled(file, weights, "h100" if target == "cpu" else target, pipeline)
    if not plan.ptx:
        raise click.UsageError("--ir ptx: there is no code for GPUs in this")
    if as_json:
        return show_json(ptx=dict(plan.ptx))
    click.echo("\n".join(plan.ptx.values()), nl=False)


def explain_ir(
    file: Path,
    stage: str,
    target: str,
    weights: tuple[str, ...],
    pipeline: str | None,
    as_json: bool,
) -> None:
    """Prints the text of the IR after a stage."""
    from stagefuse.compiler import stages
    from stagefuse.runtime.devices import check_target

    if stage not in stages.names():
        known = ", ".join(stages.names())
        raise click.UsageError(f"--ir: there is no stage {stage!r}; there is {known}, ptx")
    if is_plan(file):
        raise click.UsageError("--ir is for sources; a .fused file holds machine code")
    with working(f"compiling {file}"):
        texts = stages.text_after(
            file, stage, named_weights(weights), pipeline, check_target(target)
        )
    if as_json:
        return show_json(pipelines=[{"name": name, "ir": text} for name, text in texts])
    click.echo("\n".join(text for _, text in texts), nl=False)


@commands.command(short_help="Time calls of FILE.")
@FILE
@SIZES
@click.option(
    "--calls", type=click.IntRange(1), default=100, show_default=True, help="How many to time."
)
@WEIGHTS
@PIPELINE
@DEVICE
@THREADS
@JSON
def bench(
    file: Path,
    sizes: tuple[str, ...],
    calls: int,
    weights: tuple[str, ...],
    pipeline: str | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time calls of FILE (.pipe or .fused) with made-up inputs of the given sizes.

    \b
    stagefuse bench model.fused --size B=8 --size T=128 --threads 4
    """
    with opened(file, weights, pipeline, threads, device) as pipe:
        call, again = example_call(pipe, example_inputs(pipe, sizes), sizes)
        call()
        times = []
        for _ in range(calls):
            again()
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    times.sort()
    median, low, high = times[len(times) // 2], times[0], times[-1]
    if as_json:
        show_json(calls=calls, device=pipe.device, threads=pipe.threads, median_s=median,
                  min_s=low, max_s=high)  # fmt: skip
        return
    where = f"{pipe.threads} threads" if pipe.device == "cpu" else pipe.device
    click.echo(f"{pipe.signature}")
    click.echo(
        f"{calls} calls on {where}: median {median * 1e6:.1f} us, "
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
            mark = "ok" if finding.works else "-" if finding.optional else "MISSING"
            click.echo(f"{mark:<8}{finding.name:<{width}}  {finding.found}")
            if finding.help:
                click.echo(f"{'':<8}{'':<{width}}  = help: {finding.help}")
    return cli_exit.DONE if examination.sound(findings) else cli_exit.MISSING
