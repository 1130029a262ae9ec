"""What this machine has, and what of stagefuse will run on it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from stagefuse.dsl.frozen import frozen

PACKAGES = (
    "lark", "networkx", "numpy", "llvmlite", "safetensors", "ml-dtypes", "click", "rich",
)  # fmt: skip
GPU_PACKAGES = ("cuda-core", "cuda-bindings")
LEVELS = {"v3": "AVX2", "v4": "AVX-512"}


@frozen
class Finding:
    """One thing looked for: what was found, whether it serves, and the fix where it does not.

    What is optional is only needed for GPUs.
    """

    name: str
    found: str
    works: bool
    help: str = ""
    optional: bool = False


def examine() -> list[Finding]:
    """Every finding, in the order in which they are shown."""
    return [
        Finding("Python", platform.python_version(), True),
        _system(),
        _processor(),
        Finding("threads", str(len(os.sched_getaffinity(0))), True),
        *(_package(name) for name in PACKAGES),
        *gpu_findings(),
    ]


def gpu_findings() -> list[Finding]:
    """What there is to make GPU code and to run it."""
    found = [_assembler(), *(_package(name, optional=True) for name in GPU_PACKAGES)]
    gpus = _gpus() if all(f.works for f in found[1:]) else [_driver_file()]
    found += gpus
    devices = ["cpu", "emulator (of GPU code)", *(f.name for f in gpus if f.name != "driver")]
    return [*found, Finding("devices", ", ".join(devices), True)]


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {"ok": sound(findings), "findings": [asdict(f) for f in findings]}


def sound(findings: list[Finding]) -> bool:
    """Whether nothing is missing that every use needs."""
    return all(f.works or f.optional for f in findings)


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
    units = LEVELS.get(level, "") + (", AMX" if native.may_use_tiles() else "")
    return Finding("processor", f"{model}: x86-64-{level} ({units})", True)


def _package(name: str, optional: bool = False) -> Finding:
    try:
        return Finding(name, metadata.version(name), True, optional=optional)
    except metadata.PackageNotFoundError:
        wanted = '"stagefuse[gpu]"' if optional else name
        return Finding(name, "missing", False, f"python -m pip install {wanted}", optional)


def _assembler() -> Finding:
    from stagefuse.compiler.gpu.assemble import AssemblerMissing, ptxas

    try:
        tool = ptxas()
    except AssemblerMissing:
        fix = 'python -m pip install "stagefuse[gpu]"'
        found = "missing: plans hold PTX only, which the driver compiles"
        return Finding("ptxas", found, False, fix, optional=True)
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([\d.]+)", said)
    return Finding("ptxas", release[1] if release else str(tool), True, optional=True)


def _driver_file() -> Finding:
    from stagefuse.runtime.cuda import found

    there = "found" if found.has_driver() else "none, so no GPU"
    return Finding("driver", there, found.has_driver(), optional=True)


def _gpus() -> list[Finding]:
    """The driver and each GPU, with the code that runs on it."""
    from stagefuse.runtime.cuda import calls, found
    from stagefuse.runtime.errors import DeviceError

    try:
        version = ".".join(map(str, calls.driver_version()))
        listed = found.gpus()
    except DeviceError as error:
        text = str(error).partition("\n")[0]
        return [Finding("driver", text, False, "needed only to run on a GPU", optional=True)]
    findings = [Finding("driver", f"for CUDA {version}", True, optional=True)]
    for gpu in listed:
        arch = found.arch_for(gpu)
        runs = f"runs code for {arch}" if arch else "older than any that code is made for"
        text = f"{gpu}, {gpu.memory / 1e9:.0f} GB: {runs}"
        findings.append(Finding(f"cuda:{gpu.number}", text, arch is not None, optional=True))
    return findings
