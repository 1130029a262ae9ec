"""Modules of other compilers, read and printed again, assemble."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagefuse.compiler.ptx import print_module, read_module
from tests.runtime.emulator import fixtures

from .assembler import assemble, needs_ptxas

FIXTURES = [path for path in sorted(Path(fixtures.__file__).parent.glob("*.ptx"))
            if not path.stem.rpartition(".")[2].isupper()]  # fmt: skip
"""But for those with planted bugs, which are the same instructions."""


@needs_ptxas
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_what_is_printed_assembles(path: Path, tmp_path: Path) -> None:
    module = read_module(path.read_text())
    (target,) = module.target
    target = "sm_90a" if target == "sm_90" else target
    assert assemble(print_module(module), target, tmp_path) == []
