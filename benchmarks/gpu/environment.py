"""What a measurement was taken on: the GPU, its clocks and the versions of everything."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

PACKAGES = ("numpy", "torch", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvcc")
_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def environment() -> dict[str, Any]:
    """Names, versions and clocks; what can't be found is left out."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": _platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _said("git", "rev-parse", "HEAD")
    return {**found, **({"commit": commit} if commit else {}), **clocks()}


def _platform() -> str:
    return f"{platform.system()} {platform.machine()}"


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU at this moment."""
    said = _said("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0")
    if said is None:
        return {}
    return dict(zip(_QUERY.split(","), (part.strip() for part in said.split(",")), strict=False))


def _said(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
