"""What a command's end means to the shell: exit codes, and what is said on the way out.

0 done, 1 a wrong program or input, 2 wrong usage, 3 something missing on this machine, 70 a fault
of stagefuse itself (with a reproducer file), 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

DONE, WRONG_PROGRAM, WRONG_USAGE, MISSING, OUR_FAULT, INTERRUPTED = 0, 1, 2, 3, 70, 130


def guarded(run: Callable[[], Any], arguments: Sequence[str]) -> int:
    """The exit code of `run`; errors are told on stderr, and with `--json` as JSON on stdout."""
    as_json = "--json" in arguments
    try:
        found = run()
        if sys.stdout is not None:  # which it is where a shell closed it
            sys.stdout.flush()
        return found if isinstance(found, int) else DONE
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        if as_json:
            _show(error="UsageError", message=error.format_message())
        else:
            error.show()
        return WRONG_USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except SystemExit as end:  # what click makes of a reader that has gone
        return DONE if isinstance(end.__context__, BrokenPipeError) else _number(end.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        code, text = classify(error)
        if code == OUR_FAULT:
            path = _our_fault(error, arguments)
            if as_json:
                _show(error="InternalError", message=str(error), report=path)
        elif as_json:
            _show(**describe(error))
        else:
            click.echo(text, err=True)
        return code


def _show(**values: Any) -> None:
    """An error as JSON on stdout, or on stderr where stdout takes nothing."""
    text = json.dumps({"ok": False, **values}, indent=2)
    try:
        click.echo(text)
    except OSError:
        click.echo(text, err=True)


def _number(code: object) -> int:
    return code if isinstance(code, int) else DONE if code is None else OUR_FAULT


def classify(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and its text."""
    from stagefuse.compiler.errors import PlanError
    from stagefuse.dsl.diagnostics import CompileError, render_all
    from stagefuse.onnx.errors import OnnxError
    from stagefuse.runtime.errors import DeviceError, IndexOutOfRange, InputError, OutOfMemory

    if isinstance(error, CompileError):
        return WRONG_PROGRAM, render_all(error.diagnostics, color=_colored())
    if isinstance(error, OnnxError):
        head = f"{error.path}: " if error.path else ""
        return WRONG_PROGRAM, "\n".join(f"error: {head}{problem}" for problem in error.problems)
    if isinstance(error, (PlanError, InputError, IndexOutOfRange)):
        return WRONG_PROGRAM, f"error: {error}"
    if isinstance(error, (DeviceError, OutOfMemory)):
        return MISSING, f"error: {error}"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("stagefuse"):
        return MISSING, (
            f"error: the package `{error.name}` is not installed\n"
            f"  = help: python -m pip install {str(error.name).partition('.')[0]}"
        )
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MISSING, f"error: {where}{error.strerror}\n  = help: free some of the disk"
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE):
        return MISSING, f"error: {where}{error.strerror}"  # of the disk, or of what is mounted
    if isinstance(error, OSError) and error.filename is not None:
        return WRONG_PROGRAM, f"error: {error.filename}: {error.strerror or error}"
    return OUR_FAULT, str(error)


def describe(error: BaseException) -> dict[str, Any]:
    """An error as the JSON object that a command prints."""
    from stagefuse.dsl.diagnostics import CompileError, to_json

    found: dict[str, Any] = {"error": type(error).__name__}
    if isinstance(error, CompileError):
        ordered = sorted(error.diagnostics, key=lambda d: d.position)
        return {**found, "diagnostics": [to_json(d) for d in ordered]}
    return {**found, "message": classify(error)[1].removeprefix("error: ")}


def _colored() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


def _our_fault(error: BaseException, arguments: Sequence[str]) -> str:
    """Say so on stderr, and write what is needed to see it again into a file; its path."""
    from stagefuse import __version__

    parts = [
        "a fault of stagefuse itself",
        f"stagefuse {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"arguments: {list(arguments)}",
        "".join(traceback.format_exception(error)),
    ]
    for name in arguments:
        if name.endswith(".pipe") and Path(name).is_file():
            source = Path(name).read_text(encoding="utf-8", errors="replace")
            parts.append(f"--- {name}\n{source}")
    number, path = tempfile.mkstemp(prefix="stagefuse-fault-", suffix=".txt")
    with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n\n".join(parts))
    click.echo(f"internal error: {type(error).__name__}: {error}", err=True)
    click.echo("  = note: this is a fault of stagefuse, not of the program", err=True)
    click.echo(f"  = help: report it with the file {path}", err=True)
    return path
