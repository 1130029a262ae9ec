"""PTX to machine code: ptxas from the wheel `nvidia-cuda-nvcc`, with what it says of each kernel.

Results are kept in the user's cache by the content of the text, the options and ptxas's version.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Thread

from stagefuse.compiler.errors import InternalError
from stagefuse.dsl import cache
from stagefuse.dsl.frozen import frozen

PACKAGE = "nvidia-cuda-nvcc"
OPTIONS = ("-v",)


@frozen
class Usage:
    """What ptxas says of a kernel; sizes in bytes, `shared` only what is not dynamic."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


@frozen
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


def assemble(arch: str, text: str) -> Assembled:
    """A module, assembled. Raises AssemblerMissing, InternalError."""
    return Job(ptxas(), arch, text).run()


class Assembly:
    """Modules being assembled, each by a process, while the caller goes on writing others.

    There are as many processes as cores, of which one is the caller's until it waits.
    """

    def __init__(self) -> None:
        """Raises AssemblerMissing."""
        self.tool = ptxas()
        self.waiting: deque[Job] = deque()
        self.made: list[Job] = []
        self.threads: list[Thread] = []

    def add(self, arch: str, text: str) -> Job:
        """Starts on a module."""
        job = Job(self.tool, arch, text)
        self.made.append(job)
        self.waiting.append(job)
        self.threads = [t for t in self.threads if t.is_alive()]
        if len(self.threads) < max(len(os.sched_getaffinity(0)) - 1, 1):
            self.threads.append(Thread(target=self._work, daemon=True))
            self.threads[-1].start()
        return job

    def _work(self) -> None:
        while True:
            try:
                job = self.waiting.popleft()
            except IndexError:
                return
            job.attempt()

    def wait(self) -> None:
        """Returns when nothing is left to assemble; helps."""
        self._work()
        for thread in self.threads:
            thread.join()

    def stop(self) -> None:
        """Ends what is not waited for."""
        self.waiting.clear()
        for job in self.made:
            job.stop()
        for thread in self.threads:
            thread.join()


class Job:
    """One module for ptxas."""

    def __init__(self, tool: Path, arch: str, text: str) -> None:
        self.tool, self.arch, self.text = tool, arch, text
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False
        self.outcome: Assembled | Exception | None = None

    def attempt(self) -> None:
        """Runs it, and keeps what came out for `result`."""
        try:
            self.outcome = self.run()
        except Exception as error:  # the caller's to raise, who is in another thread
            self.outcome = error

    def result(self) -> Assembled:
        """What came out, once it is waited for. Raises InternalError, OSError."""
        if isinstance(self.outcome, Assembled):
            return self.outcome
        raise self.outcome or InternalError("a module was not waited for")

    def run(self) -> Assembled:
        """The module, kept or new. Raises InternalError with the lines that ptxas refused."""
        key = _key(self.tool, self.arch, self.text)
        made = _kept(key)
        if made is None:
            made = self._assembled()
            _keep(key, made)
        return made

    def _assembled(self) -> Assembled:
        with tempfile.TemporaryDirectory(prefix="stagefuse-") as folder:
            source = Path(folder) / "kernels.ptx"
            source.write_text(self.text, encoding="utf-8")
            output = source.with_suffix(".cubin")
            files = ["-o", str(output), str(source)]
            self.process = subprocess.Popen(
                [str(self.tool), *OPTIONS, f"-arch={self.arch}", *files],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            if self.stopped:
                self.process.kill()
            said, _ = self.process.communicate()
            if self.process.returncode:
                quoted = self._quoted(said)
                raise InternalError(f"ptxas refused a module for {self.arch}:\n{quoted}")
            return Assembled(output.read_bytes(), read_usage(said))

    def stop(self) -> None:
        """Ends the process, if it runs or when it starts."""
        self.stopped = True
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

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
    return cache.name_of("cubin", parts)


def _kept(key: str) -> Assembled | None:
    """The figures as a line of JSON, then the cubin."""
    usage, _, code = (cache.kept(key) or b"").partition(b"\n")
    if not usage:
        return None
    return Assembled(code, {name: Usage(**u) for name, u in json.loads(usage).items()})


def _keep(key: str, made: Assembled) -> None:
    usage = {name: asdict(u) for name, u in made.usage.items()}
    cache.keep(key, json.dumps(usage).encode() + b"\n" + made.cubin)
