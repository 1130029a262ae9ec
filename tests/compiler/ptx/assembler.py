"""Where ptxas is, if it is installed."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest


@cache
def ptxas() -> Path | None:
    try:
        import nvidia.cu13 as package
    except ImportError:
        return None
    found = [Path(folder) / "bin" / "ptxas" for folder in package.__path__]
    return next((path for path in found if path.exists()), None)


needs_ptxas = pytest.mark.skipif(ptxas() is None, reason="needs the package nvidia-cuda-nvcc")


def assemble(text: str, target: str, folder: Path) -> list[tuple[int, str]]:
    """The errors of ptxas, with their lines."""
    source = folder / "module.ptx"
    source.write_text(text)
    command = [str(ptxas()), f"-arch={target}", str(source), "-o", str(folder / "module.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.findall(r"line (\d+); error\s*:\s*(.*)", done.stderr)
    assert bool(found) == bool(done.returncode), done.stderr
    return [(int(line), message) for line, message in found]
