"""Commands run in this process, and the programs that they are tried on."""

from pathlib import Path
from typing import Any

import pytest

from stagefuse import cli, cli_exit

ROOT = Path(__file__).resolve().parent.parent.parent
GOOD = '''"""Rows to probabilities."""
import nn

pipeline classify(x: f32[B, N]) -> (p: f32[B, N], label: i64[B])
where N >= 1:
    p = nn.softmax(x)
    p, argmax(p, axis=1)
'''
WRONG = "pipeline p(x: f32[B, 3], y: f32[B, 4]) -> f32[B, 3]:\n    x + y\n"


class Shell:
    """Runs commands in this process and keeps what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: Any) -> tuple[int, str, str]:
        texts = [str(a) for a in arguments]
        code = cli_exit.guarded(lambda: cli.run_command(texts), texts)
        printed = self.capsys.readouterr()
        return code, printed.out, printed.err
