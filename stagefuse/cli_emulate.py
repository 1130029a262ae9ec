"""`stagefuse emulate`: a plan's GPU code, or any PTX, run here without a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .cli_shared import (
    FILE,
    INPUTS,
    JSON,
    OUTPUT_DIR,
    PIPELINE,
    SIZES,
    WEIGHTS,
    example_inputs,
    is_whole,
    opened,
    read_array,
    read_inputs,
    show_json,
    show_results,
    write_array,
)
from .cli_states import called, example_call

_BUFFER = re.compile(r"(zeros|new|random):(\w+)\[([\d, ]*)\]\Z")
_SCALAR = re.compile(r"(\w+):([-+.\w]+)\Z")
_SCALARS = {
    "f64": "f8", "f32": "f4", "f16": "f2", "s64": "i8", "s32": "i4", "s16": "i2", "s8": "i1",
    "u64": "u8", "u32": "u4", "u16": "u2", "u8": "u1", "i64": "i8", "i32": "i4", "i16": "i2",
    "i8": "i1",
}  # fmt: skip


@click.command()
@FILE
@INPUTS
@SIZES
@click.option("--arch", metavar="SM", help="Whose code of a plan, such as sm_80.")
@click.option("--kernel", metavar="NAME", help="The entry of a .ptx file to launch.")
@click.option("--grid", default="1", show_default=True, metavar="X[,Y[,Z]]", help="In blocks.")
@click.option("--block", default="32", show_default=True, metavar="X[,Y[,Z]]", help="In threads.")
@click.option("--cluster", default="1", show_default=True, metavar="X[,Y[,Z]]", help="In blocks.")
@click.option("--shared", default=0, show_default=True, help="Dynamic shared memory in bytes.")
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="ARG",
    help="In order: FILE.npy, zeros:f32[64], new:f32[64] (unwritten), random:f32[64], or s32:5.",
)
@click.option("--time-limit", type=float, metavar="SECONDS", help="Stop a kernel that runs on.")
@OUTPUT_DIR
@WEIGHTS
@PIPELINE
@JSON
def emulate(
    file: Path,
    inputs: tuple[str, ...],
    sizes: tuple[str, ...],
    arch: str | None,
    kernel: str | None,
    grid: str,
    block: str,
    cluster: str,
    shared: int,
    arguments: tuple[str, ...],
    time_limit: float | None,
    output_dir: Path | None,
    weights: tuple[str, ...],
    pipeline: str | None,
    as_json: bool,
) -> None:
    """Run GPU code on this machine's CPU, every access checked.

    FILE is a .pipe or .fused file, run with --input or with made-up inputs of the given --size,
    or a .ptx file, of which --kernel is launched with each --arg. A fault of a kernel (access out
    of bounds or misaligned, race, unwritten memory read, barrier, deadlock) is shown with its
    line; of a .ptx file's it is exit code 1, of our own a fault of stagefuse. A deadlock says
    where threads stand, and so does a kernel that --time-limit stops.
    """
    is_ptx = file.suffix == ".ptx"
    _refuse(
        {"--input": inputs, "--size": sizes, "--arch": arch, "--weights": weights,
         "--pipeline": pipeline} if is_ptx
        else {"--kernel": kernel, "--arg": arguments, "--time-limit": time_limit},
        ".pipe and .fused files" if is_ptx else ".ptx files",
    )  # fmt: skip
    if is_ptx:
        sides = {"grid": grid, "block": block, "cluster": cluster}
        shape = {name: _sides(text, name) for name, text in sides.items()}
        sizes_of = {**shape, "shared_bytes": shared, "time_limit": time_limit}
        return emulate_ptx(file, kernel, sizes_of, arguments, output_dir, as_json)
    device = "emulator" if arch is None else f"emulator:{arch}"
    with opened(file, weights, pipeline, device=device) as pipe:
        if inputs:
            found = called(pipe, read_inputs(inputs, pipe), sizes, None, None)
        else:
            found = example_call(pipe, example_inputs(pipe, sizes), sizes)[0]()
        if not as_json:
            for launch, record in pipe.driver.records:  # type: ignore[attr-defined]
                where = f"grid {launch.grid}, block {launch.block}"
                click.echo(f"{launch.label or launch.kernel}: {where}", err=True)
                click.echo(_summary(record), err=True)
        show_results(pipe, found, output_dir, as_json)


def _refuse(options: Mapping[str, Any], what: str) -> None:
    """Refuse options that are given and mean something for other files only."""
    for name, value in options.items():
        if value is not None and value != ():
            raise click.UsageError(f"{name} is for {what}")


def emulate_ptx(
    file: Path,
    kernel: str | None,
    sizes: dict[str, Any],
    arguments: Sequence[str],
    output_dir: Path | None,
    as_json: bool,
) -> None:
    """Launches a kernel of a PTX file and prints the buffers that it was given."""
    import numpy as np

    from stagefuse.compiler.ptx import PtxError
    from stagefuse.runtime import emulator
    from stagefuse.runtime.errors import InputError

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no PTX: {error}") from error
    entries = re.findall(r"\.entry\s+([\w$]+)", text)
    if kernel is None and len(entries) == 1:
        kernel = entries[0]
    if kernel is None or kernel not in entries:
        raise click.UsageError(f"--kernel is one of {', '.join(entries) or 'none'}")
    values = [_argument(a) for a in arguments]
    try:
        record = emulator.load(text).launch(kernel, args=values, **sizes)
    except (emulator.Fault, PtxError, ValueError, TimeoutError) as error:
        raise InputError(f"{file}: {error}") from error
    buffers = {i: v for i, v in enumerate(values) if isinstance(v, np.ndarray)}
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        for number, array in buffers.items():
            write_array(output_dir / f"arg{number}.npy", array)
    if as_json:
        return show_json(
            kernel=kernel, record=_record(record),
            buffers={str(i): np.asarray(v).tolist() for i, v in buffers.items()},
        )  # fmt: skip
    click.echo(f"{kernel}: grid {sizes['grid']}, block {sizes['block']}", err=True)
    click.echo(_summary(record), err=True)
    for number, array in buffers.items():
        click.echo(f"arg {number}: {array.dtype.name}{list(array.shape)}")
        if output_dir is None:
            click.echo(np.array2string(np.asarray(array), threshold=60))


def _sides(text: str, name: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if not 1 <= len(parts) <= 3 or not all(is_whole(p.strip()) for p in parts):
        raise click.UsageError(f"--{name} takes one to three whole numbers, not {text!r}")
    x, y, z = [int(p) for p in parts] + [1] * (3 - len(parts))
    return x, y, z


def _argument(text: str) -> Any:
    """The value of an --arg."""
    import numpy as np

    from stagefuse.dsl.dtypes import DTYPES
    from stagefuse.runtime import emulator

    if text.endswith(".npy"):
        if not Path(text).is_file():
            raise click.UsageError(f"--arg: there is no file {text!r}")
        return read_array("--arg", text)
    buffer = _BUFFER.match(text)
    if buffer:
        shape = tuple(int(n) for n in buffer[3].split(",") if n.strip())
        name = buffer[2] if buffer[2] in DTYPES else f"i{buffer[2][1:]}"  # s32 is PTX's word
        if name not in DTYPES or buffer[2][:1] not in ("s", name[0]):
            raise click.UsageError(f"--arg takes types, and there is no type {buffer[2]!r}")
        dtype = DTYPES[name].numpy
        if buffer[1] == "new":
            return emulator.uninitialised(shape, dtype)
        if buffer[1] == "zeros":
            return np.zeros(shape, dtype)
        seed = int(np.random.default_rng().integers(1 << 31))
        click.echo(f"{text}: seed {seed}", err=True)
        return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    scalar = _SCALAR.match(text)
    if scalar and scalar[1] in _SCALARS:
        kind = np.dtype(_SCALARS[scalar[1]])
        try:
            number = float(scalar[2]) if kind.kind == "f" else int(scalar[2], 0)
            return kind.type(number)
        except (ValueError, OverflowError):
            pass
    raise click.UsageError(
        f"--arg takes FILE.npy, zeros:f32[64], new:f32[64], random:f32[64] or s32:5, not {text!r}"
    )


def _summary(record: Any) -> str:
    """What a launch ran, in two lines."""
    most = sorted(record.instructions.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count} {name}" for name, count in most[:6])
    moved = ", ".join(f"{n} bytes {how} in {space}" for (space, how), n in record.bytes.items())
    conflicts = record.bank_conflicts
    extra = f"; {conflicts} cycles of bank conflicts" if conflicts else ""
    return f"  {record.total} instructions: {shown}\n  {moved or 'no memory'}{extra}"


def _record(record: Any) -> dict[str, Any]:
    return {
        "instructions": dict(record.instructions),
        "bytes": {f"{space} {how}": n for (space, how), n in record.bytes.items()},
        "bank_conflicts": record.bank_conflicts,
    }
