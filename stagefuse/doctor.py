"""What this machine has, and what of stagefuse will run on it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "lark", "networkx", "numpy", "llvmlite", "safetensors", "ml-dtypes", "click", "rich",
)  # fmt: skip
LEVELS = {"v3": "AVX2", "v4": "AVX-512"}


@dataclass(frozen=True)
class Finding:
    """One thing looked for: what was found, whether it serves, and the fix where it does not."""

    name: str
    found: str
    works: bool
    help: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order in which they are shown."""
    return [
        Finding("Python", platform.python_version(), True),
        _system(),
        _processor(),
        Finding("threads", str(len(os.sched_getaffinity(0))), True),
        *(_package(name) for name in PACKAGES),
        Finding("GPU code", "not in this version: pipelines run on the CPU", True),
    ]


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {"ok": all(f.works for f in findings), "findings": [asdict(f) for f in findings]}


def _system() -> Finding:
    name = f"{platform.system()} {platform.machine()}"
    works = platform.system() == "Linux" and platform.machine() == "x86_64"
    return Finding("system", name, works, "" if works else "use Linux on x86-64")


def _processor() -> Finding:
    from stagefuse.runtime import native

    level = native.detect_level()
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    if level is None:
        return Finding("processor", model, False, "x86-64-v3 (AVX2 and FMA) is needed")
    return Finding("processor", f"{model}: x86-64-{level} ({LEVELS.get(level, '')})", True)


def _package(name: str) -> Finding:
    try:
        return Finding(name, metadata.version(name), True)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", False, f"python -m pip install {name}")
