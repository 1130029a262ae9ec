"""`stagefuse import` and `export`: from an ONNX model to a `.pipe` source and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .cli_shared import (
    FILE,
    JSON,
    PIPELINE,
    WEIGHTS,
    is_whole,
    named_weights,
    pairs,
    read_array,
    require_output,
    show_json,
    working,
)


@click.command("import")
@FILE
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
    help="The .pipe file to write.",
)
@click.option(
    "--fix", "fixed", multiple=True, metavar="INPUT=VALUE",
    help="Give an input of the model a value for good: numbers with commas, or a .npy file.",
)
@click.option(
    "--size", "sizes", multiple=True, metavar="NAME=RANGE",
    help="Give a size of the model a range, such as sequence=1..=512 or height=32..=1024/32 "
    "(its multiples of 32), or one value.",
)
@click.option(
    "--plain", is_flag=True,
    help="Write one line for each node, instead of layers, functions and loops.",
)
@JSON
def import_command(
    file: Path, output: Path | None, fixed: tuple[str, ...], sizes: tuple[str, ...], plain: bool,
    as_json: bool,
) -> None:
    """Import FILE (.onnx) as a .pipe source, with its weights in a .safetensors beside it.

    Without --output both go to the current folder, called like the model.
    """
    if output is not None:
        require_output(output, ".pipe", file)
    with working(f"importing {file}"):
        from .onnx.importing import file_stem, import_to

        target = output or Path(f"{file_stem(file.stem)}.pipe")
        import_to(
            file, target, fixed=fixed_values(fixed), sizes=size_ranges(sizes), plain=plain
        )
    weights = target.with_suffix(".safetensors")
    written = [str(path) for path in (target, weights) if path.is_file()]
    if as_json:
        return show_json(output=str(target), files=written)
    click.echo("\n".join(written))


def size_ranges(options: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Least and greatest value, and step, by the name of a size."""
    found: dict[str, tuple[int, ...]] = {}
    for name, text in pairs(options, "--size").items():
        ends, _, step = text.partition("/")
        low, _, high = ends.partition("..")
        numbers = (low, high.removeprefix("=") or low, step or "1")
        if not all(map(is_whole, numbers)):
            raise click.UsageError(f"--size {name} takes a number or a range, not {text!r}")
        found[name] = tuple(map(int, numbers))
    return found


def fixed_values(options: Sequence[str]) -> dict[str, Any]:
    """Arrays by input name: of a .npy file, or integers or numbers with commas."""
    import numpy as np

    found: dict[str, Any] = {}
    for name, text in pairs(options, "--fix").items():
        try:
            if text.endswith(".npy"):
                found[name] = read_array(f"--fix {name}", text)
                continue
            parts = text.strip("[]").split(",")
            whole = all(p.strip().lstrip("-").isdigit() for p in parts)
            array = np.array([int(p) if whole else float(p) for p in parts],
                             np.int64 if whole else np.float32)  # fmt: skip
            found[name] = array if "[" in text or "," in text else array[0]
        except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
            raise click.UsageError(f"--fix {name}: {text!r} is no array: {error}") from error
    return found


@click.command("export")
@FILE
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
    help="The .onnx file to write; without, beside FILE.",
)
@click.option("--opset", type=int, metavar="N", help="The version of the standard.")
@click.option("--external-data", is_flag=True, help="Keep the weights in a file beside the model.")
@WEIGHTS
@PIPELINE
@JSON
def export_command(
    file: Path, output: Path | None, opset: int | None, external_data: bool,
    weights: tuple[str, ...], pipeline: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Export a pipeline of FILE (.pipe) as an ONNX model in the standard's own domain.

    Without --output it goes beside FILE, with the ending .onnx. Weights of more than 2 GB go to
    a file MODEL.data beside it.
    """
    target = output or file.with_suffix(".onnx")
    require_output(target, ".onnx", file)
    if output is None and target.exists():  # such as the model that FILE was imported from
        raise click.UsageError(f"{target} is there already: give -o {target} to replace it")
    with working(f"exporting {file}"):
        from stagefuse.runtime.errors import InputError

        from .onnx.export.exporting import OPSET, export_to

        try:
            paths = export_to(
                file, target, pipeline=pipeline, opset=OPSET if opset is None else opset,
                external_data=external_data, weights=named_weights(weights),
            )  # fmt: skip
        except InputError:
            raise
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    written = [str(path) for path in paths]
    if as_json:
        return show_json(output=str(target), files=written)
    click.echo("\n".join(written))
