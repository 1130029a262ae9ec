"""PTX to machine code: ptxas from the wheel `nvidia-cuda-nvcc`, with what it says of each kernel.

Results are kept in the user's cache by the content of the text, the options and ptxas's version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from stagefuse.compiler.errors import InternalError
from stagefuse.dsl.cache import cache_folder, keep

PACKAGE = "nvidia-cuda-nvcc"
OPTIONS = ("-v", "--split-compile=4")
"""A module's kernels are compiled by so many threads. The code is the same whatever their number,
but that is noted in the file, which is to be the same on every machine."""


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel; sizes in bytes, `shared` only what is not dynamic."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Assembled:
    """A module for one arch."""

    cubin: bytes
    usage: Mapping[str, Usage]


class AssemblerMissing(Exception):
    """There is no ptxas on this machine."""


def ptxas() -> Path:
    """The assembler. Raises AssemblerMissing."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*/bin/ptxas")):
            return path
    found = shutil.which("ptxas")
    if found is None:
        raise AssemblerMissing(f"there is no ptxas: install the package {PACKAGE}")
    return Path(found)


class Assembly:
    """Modules being assembled, a process for each arch, while the caller goes on."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """Starts on texts by arch. Raises AssemblerMissing."""
        tool = ptxas()
        self.made: dict[str, Assembled | _Run] = {}
        for arch, text in texts.items():
            self.made[arch] = _kept(_key(tool, arch, text)) or _Run(tool, arch, text)

    def results(self) -> dict[str, Assembled]:
        """The modules by arch; waits for them. Raises InternalError."""
        return {a: m.result() if isinstance(m, _Run) else m for a, m in self.made.items()}

    def stop(self) -> None:
        """Ends processes that are not waited for."""
        for run in self.made.values():
            if isinstance(run, _Run):
                run.stop()


def assemble(texts: Mapping[str, str]) -> dict[str, Assembled]:
    """Modules by arch, assembled. Raises AssemblerMissing, InternalError."""
    running = Assembly(texts)
    try:
        return running.results()
    finally:
        running.stop()


class _Run:
    """One process of ptxas."""

    def __init__(self, tool: Path, arch: str, text: str) -> None:
        self.arch, self.text = arch, text
        self.key = _key(tool, arch, text)
        self.folder = tempfile.TemporaryDirectory(prefix="stagefuse-")
        self.source = Path(self.folder.name) / "kernels.ptx"
        self.source.write_text(text, encoding="utf-8")
        self.output = self.source.with_suffix(".cubin")
        files = ["-o", str(self.output), str(self.source)]
        command = [str(tool), *OPTIONS, f"-arch={arch}", *files]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def result(self) -> Assembled:
        """What came out. Raises InternalError with the lines that ptxas refused."""
        said, _ = self.process.communicate()
        with self.folder:
            if self.process.returncode:
                quoted = self._quoted(said)
                raise InternalError(f"ptxas refused a module for {self.arch}:\n{quoted}")
            made = Assembled(self.output.read_bytes(), read_usage(said))
        with suppress(OSError):
            _keep(self.key, made)
        return made

    def stop(self) -> None:
        """Ends the process, if it still runs, and removes its files."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        self.folder.cleanup()

    def _quoted(self, said: str) -> str:
        lines = self.text.splitlines()
        shown: list[str] = []
        for message in said.splitlines()[:10]:
            shown.append(message)
            at = re.search(r"line (\d+)", message)
            if at is not None:
                shown.append(f"    {lines[int(at[1]) - 1].strip()}")
        return "\n".join(shown)


_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def read_usage(said: str) -> dict[str, Usage]:
    """The figures in the output of `ptxas -v`."""
    found: dict[str, Usage] = {}
    name, stack = "", (0, 0, 0)
    for line in said.splitlines():
        if match := _ENTRY.search(line):
            name = match[1]
        elif match := _STACK.search(line):
            stack = (int(match[1]), int(match[2]), int(match[3]))
        elif match := _REGISTERS.search(line):
            shared = _SHARED.search(line)
            found[name] = Usage(
                int(match[1]), stack[1], stack[2], stack[0], int(shared[1]) if shared else 0
            )
    return found


# The cache


def _key(tool: Path, arch: str, text: str) -> str:
    stamp = tool.stat()
    parts = (str(tool), str(stamp.st_size), str(stamp.st_mtime_ns), *OPTIONS, arch, text)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _kept(key: str) -> Assembled | None:
    folder = cache_folder()
    if folder is None:
        return None
    with suppress(OSError, ValueError, TypeError, KeyError):
        usage = json.loads((folder / f"cubin-{key}.json").read_text())
        code = (folder / f"cubin-{key}.bin").read_bytes()
        if hashlib.sha256(code).hexdigest() == usage.pop("sha256"):
            return Assembled(code, {name: Usage(**u) for name, u in usage.items()})
    return None


def _keep(key: str, made: Assembled) -> None:
    folder = cache_folder()
    if folder is None:
        return
    usage: dict[str, object] = {name: asdict(u) for name, u in made.usage.items()}
    usage["sha256"] = hashlib.sha256(made.cubin).hexdigest()
    text = json.dumps(usage).encode()
    keep(folder / f"cubin-{key}.bin", lambda file: file.write(made.cubin))
    keep(folder / f"cubin-{key}.json", lambda file: file.write(text))
