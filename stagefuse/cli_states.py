"""Sessions on the command line: states from files and into files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zipfile import ZipFile

import click

from stagefuse.dsl.files import replace_file

from .cli_shared import whole_numbers

if TYPE_CHECKING:
    from stagefuse.runtime.pipeline import Pipeline
    from stagefuse.runtime.session import Session

STATE_IN = click.option(
    "--state-in", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.npz",
    help="What the pipeline keeps between calls, as --state-out wrote it; else it begins anew.",
)
STATE_OUT = click.option(
    "--state-out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.npz",
    help="Where to write what the pipeline keeps after the call; may be the file of --state-in.",
)


def called(
    pipe: Pipeline,
    inputs: dict[str, Any],
    sizes: Sequence[str],
    state_in: Path | None,
    state_out: Path | None,
) -> Any:
    """What a call gives: of the pipeline, or of a session where it keeps states."""
    if not pipe.signature.states:
        given = {"--state-in": state_in, "--state-out": state_out, "--size": sizes}
        for option, value in given.items():
            if value:
                raise click.UsageError(f"{option} is for pipelines that keep states")
        return pipe(**inputs)
    kept = None if state_in is None else _arrays(state_in)
    with session_of(pipe, sizes, kept) as session:
        found = session(**inputs)
        if state_out is not None:
            snapshot = session.snapshot()
            replace_file(state_out, lambda file: _write_arrays(file, snapshot))
    return found


def session_of(
    pipe: Pipeline, options: Sequence[str], kept: dict[str, Any] | None = None
) -> Session:
    """A session whose sizes are options, or those of arrays that were kept."""
    from stagefuse.compiler.plan_check import session_dims

    names = session_dims(pipe._plan)
    sizes = whole_numbers(options)
    if kept is not None:
        from stagefuse.runtime.session import sizes_of

        sizes = {**sizes_of(pipe._plan, kept), **sizes}
    missing = [name for name in names if name not in sizes]
    if missing:
        raise click.UsageError("give " + " and ".join(f"--size {name}=..." for name in missing))
    session = pipe.session(**sizes)
    if kept is not None:
        session.restore(kept)
    return session


def example_call(
    pipe: Pipeline, inputs: dict[str, Any], sizes: Sequence[str]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call to be timed, and what to do before it: a session begins anew each time."""
    if not pipe.signature.states:
        return (lambda: pipe(**inputs)), (lambda: None)
    from stagefuse.compiler.plan_check import session_dims

    names = session_dims(pipe._plan)
    session = session_of(pipe, [o for o in sizes if o.partition("=")[0] in names])
    return (lambda: session(**inputs)), session.reset


def _write_arrays(file: IO[bytes], arrays: dict[str, Any]) -> None:
    """A .npz file; unlike `numpy.savez` it takes any names, `file` too."""
    import numpy as np

    with ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with found:
            return {name: found[name] for name in found.files}
    except Exception as error:  # NumPy and zipfile raise what they like for damaged files
        wrong = "cannot be read" if isinstance(error, MemoryError) else "is no .npz file"
        raise click.UsageError(f"--state-in: {str(path)!r} {wrong}: {error}") from error
