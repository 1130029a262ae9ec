"""`stagefuse fmt`: sources in the one layout."""

from __future__ import annotations

from pathlib import Path

import click

from stagefuse.dsl.files import replace_file

from .cli_exit import DONE, WRONG_PROGRAM
from .cli_shared import JSON, show_json


@click.command("fmt", short_help="Write FILEs in the one layout.")
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)  # fmt: skip
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a file would change.")
@click.option("--diff", is_flag=True, help="Write nothing; print what would change.")
@JSON
def fmt(files: tuple[Path, ...], check: bool, diff: bool, as_json: bool) -> int:
    """Write each FILE (.pipe) in the one layout: indentation, spaces and blank lines.

    No line is broken or joined, and comments and the meaning stay. A file that does not parse is
    reported and left as it is.

    \b
    stagefuse fmt model.pipe
    stagefuse fmt --check *.pipe
    """
    changed = []
    from stagefuse.compiler.front import read_source
    from stagefuse.dsl.format import differences, formatted

    for path in files:
        source = read_source(path)
        text = formatted(source)
        if text.encode() == path.read_bytes():
            continue
        changed.append(path)
        if diff and not as_json:
            click.echo("".join(differences(source, text)), nl=False)
        elif not check and not diff:
            _replace(path, text)
    if as_json:
        show_json(files=[{"file": str(path), "changed": path in changed} for path in files])
    elif not diff:
        for path in changed:
            click.echo(f"{path}: {'would change' if check else 'formatted'}")
    return WRONG_PROGRAM if check and changed else DONE


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all; it keeps its permissions, and a link stays one."""
    mode = path.stat().st_mode & 0o7777
    replace_file(path, lambda file: file.write(text.encode()), mode)
