"""What the commands share: options, plans and pipelines of files, inputs, progress and JSON."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagefuse.dsl.files import replace_file

if TYPE_CHECKING:
    import numpy as np

    from stagefuse.compiler.plan import PipelinePlan, Plan
    from stagefuse.compiler.plan_writing import Writing
    from stagefuse.runtime.pipeline import Pipeline

FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
WEIGHTS = click.option(
    "--weights", multiple=True, metavar="NAME=PATH", help="Another file for weights NAME."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
PIPELINE = click.option("--pipeline", metavar="NAME", help="Which one, if there are several.")
THREADS = click.option("--threads", type=click.IntRange(1, 64), help="As many threads at most.")
DEVICE = click.option(
    "--device", metavar="NAME",
    help="cpu, cuda:0 and on, or emulator; without it the first GPU that fits, else the CPU.",
)
SIZES = click.option(
    "--size", "sizes", multiple=True, metavar="NAME=N", help="A dimension, as B=8."
)
INPUTS = click.option(
    "--input", "inputs", multiple=True, metavar="NAME=FILE.npy",
    help="Each input; the name may be left out where the file is called like it.",
)
OUTPUT_DIR = click.option(
    "-o", "--output-dir", type=click.Path(file_okay=False, path_type=Path),
    help="A folder for the results, made if it is not there.",
)
ENDINGS = frozenset(
    {".pipe", ".fused", ".onnx", ".safetensors", ".npz", ".npy", ".gguf", ".json", ".ptx"}
)
"""Of the files that are written and read."""


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


def require_output(output: Path, ending: str, source: Path) -> None:
    """Raises UsageError for an output that is the source, or by its name something else that a
    source may read, such as its weights."""
    if output.exists() and output.samefile(source):
        raise click.UsageError(f"-o: {output} is the source itself")
    if output.suffix.lower() in ENDINGS - {ending}:
        raise click.UsageError(f"-o: {output} is no name of a {ending} file")


def show_json(**values: Any) -> None:
    click.echo(json.dumps({"ok": True, **values}, indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """A value of `tolist` as JSON has it: NaN and infinities, which it lacks, as texts."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_array(path: Path, array: Any) -> None:
    """A .npy file, written whole or not at all.

    Raises OSError, which names `path`.
    """
    import numpy as np

    replace_file(path, lambda file: np.save(file, np.asarray(array)))


def show_results(pipe: Pipeline, found: Any, output_dir: Path | None, as_json: bool) -> None:
    """Prints what a call gave, or writes each result to a .npy file of a folder."""
    import numpy as np

    arguments = pipe.signature.results
    arrays = [found] if len(arguments) == 1 else list(found)
    names = [a.name or ("result" if len(arrays) == 1 else f"result{i}")
             for i, a in enumerate(arguments)]  # fmt: skip
    paths: dict[str, str] = {}
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, array in zip(names, arrays, strict=True):
            paths[name] = str(output_dir / f"{name}.npy")
            write_array(Path(paths[name]), array)
    if as_json:
        show_json(results=[
            {"name": name, "type": argument.dtype, "shape": list(array.shape),
             **({"file": paths[name]} if name in paths else {"values": plain(array.tolist())})}
            for name, argument, array in zip(names, arguments, arrays, strict=True)
        ])  # fmt: skip
        return
    for name, argument, array in zip(names, arguments, arrays, strict=True):
        click.echo(f"{name}: {argument.dtype}{list(array.shape)}")
        click.echo(f"  {paths[name]}" if name in paths else np.array2string(array, threshold=60))


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
    """Whether the file is a compiled one, by its name or its first bytes: a zip archive."""
    with file.open("rb") as handle:
        return file.suffix == ".fused" or handle.read(4) == b"PK\x03\x04"


def require_source(file: Path, command: str) -> None:
    """Refuse a compiled file where a source is wanted."""
    if is_plan(file):
        raise click.UsageError(f"`{command}` takes a source, and {file} is compiled already")


def compiled(
    file: Path,
    weights: Sequence[str],
    target: str,
    pipeline: str | None,
    verify: bool = True,
    gpu: bool = True,
    write: Writing | None = None,
) -> Plan:
    """The plan of a source file, or the plan that the file is."""
    if is_plan(file):
        if weights:
            raise click.UsageError("--weights is for sources; a .fused file holds its weights")
        from stagefuse.compiler import plan_file

        return plan_file.read(file, gpu=gpu)
    from stagefuse.runtime.devices import check_target, require_code

    targets = check_target(target)
    with working(f"compiling {file}"):
        from stagefuse.compiler import driver

        plan = driver.compile_file(
            file, targets=targets, weights=named_weights(weights), pipeline=pipeline,
            verify=verify, write=write,
        )  # fmt: skip
    if not plan.pipelines:
        raise _no_pipeline(file, weights, pipeline)
    require_code(plan, targets)
    if pipeline is None and plan.ptx:
        _say_what_is_stale(file, plan)
    return plan


def _say_what_is_stale(file: Path, plan: Plan) -> None:
    """Notes on entries of the lock file that changed nothing in a plan of all pipelines."""
    from stagefuse.compiler import tuned

    for note in tuned.stale_beside(file, plan):
        click.echo(f"note: {note}", err=True)


def _no_pipeline(file: Path, weights: Sequence[str], pipeline: str | None) -> Exception:
    from stagefuse.compiler import driver
    from stagefuse.runtime.errors import InputError

    names = [p.name for p in driver.check_file(file, named_weights(weights))[0].pipelines]
    if not names:
        return InputError(f"{file} holds no pipeline")
    return click.UsageError(f"--pipeline: none is called {pipeline!r}; there is {', '.join(names)}")


def opened(
    file: Path,
    weights: Sequence[str],
    pipeline: str | None,
    threads: int | None = None,
    device: str | None = None,
) -> Pipeline:
    """The pipeline of a source or a plan on a device, ready to call."""
    from stagefuse.runtime.devices import check_device, open_plan, targets_for, wants_gpu

    device = check_device(device)
    if is_plan(file):
        gpu = wants_gpu(device, threads)
        return open_plan(compiled(file, weights, "", pipeline, gpu=gpu), pipeline, device, threads)
    target = ",".join(targets_for(None, device))
    return open_plan(compiled(file, weights, target, pipeline), pipeline, device, threads)


def read_inputs(options: Sequence[str], pipe: Pipeline) -> dict[str, Any]:
    """Arrays by input name; a bare path names the input that is called like the file.

    A .npy file does not know bf16 and f8: its bytes are taken for what the input is.
    """

    from stagefuse.dsl.dtypes import DTYPES

    wanted = {a.name: DTYPES[a.dtype] for a in pipe.signature.inputs}

    named = [o if "=" in o else f"{Path(o).stem}={o}" for o in options]
    found: dict[str, Any] = {}
    for name, path in pairs(named, "--input").items():
        if not Path(path).is_file():
            raise click.UsageError(f"--input {name}: there is no file {path!r}")
        array = read_array(f"--input {name}", path)
        small = wanted.get(name)
        if small is not None and small.is_small_float and array.dtype == f"V{small.itemsize}":
            array = array.view(small.numpy)
        found[name] = array
    return found


def read_array(option: str, path: str) -> np.ndarray[Any, Any]:
    """The array of a .npy file, which `option` names."""
    import numpy as np

    with open(path, "rb") as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:
            raise click.UsageError(f"{option}: {path!r} is no .npy file")
    try:
        array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises what it likes for damaged files
        raise click.UsageError(f"{option}: {path!r} cannot be read: {error}") from error
    return array


def is_whole(text: str) -> bool:
    """Whether a text is a whole number that is not negative, of a length that Python reads."""
    return text.isascii() and text.isdigit() and len(text) <= 1000


def whole_numbers(options: Sequence[str]) -> dict[str, int]:
    """The --size options by name."""
    sizes: dict[str, int] = {}
    for name, text in pairs(options, "--size").items():
        if not is_whole(text):
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
        raise click.UsageError("give " + " and ".join(f"--size {name}=..." for name in missing))


def sizes_of_each(
    plans: Sequence[PipelinePlan], options: Sequence[str]
) -> dict[str, dict[str, int] | None]:
    """The sizes of a call of each pipeline by its name, of options for all; None without options.

    Raises UsageError for a size that none of them has, or that one lacks; InputError.
    """
    from stagefuse.runtime.binding import Binder

    if not options:
        return dict.fromkeys(p.name for p in plans)
    given = whole_numbers(options)
    require_sizes(list(dict.fromkeys(d.name for p in plans for d in p.dims)), given)
    found: dict[str, dict[str, int] | None] = {}
    for plan in plans:
        own = {d.name: given[d.name] for d in plan.dims}
        Binder(plan).check_sizes(own, dict.fromkeys(own, "--size"))
        found[plan.name] = own
    return found


def example_inputs(pipe: Pipeline, options: Sequence[str]) -> dict[str, Any]:
    """Made-up inputs with the given sizes; every dimension must be given."""
    from stagefuse.runtime.pipeline import example_inputs as invented

    sizes = whole_numbers(options)
    require_sizes([name for name, _, _ in pipe.signature.ranges], sizes)
    return invented(pipe._plan, sizes)
