"""Takes the measurements: every engine in its own process, in interleaved rounds.

Thread pools and copies of OpenMP would meet in one process. Ratios are taken within a round, in
which the engines follow each other in an order that turns, so that a machine whose speed changes
from minute to minute slows all of them alike.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .engines import AVX2_ENVIRONMENT, ENGINES
from .worker import Batch, Failure, Job, Loaded, serve
from .workload import Family, Sizes


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    engines: tuple[str, ...]
    threads: int
    level: str  # of x86-64: v3 is AVX2, v4 AVX-512, v4-amx has AMX too
    rounds: int
    seconds: float  # of a batch
    tries: int  # for a batch that nothing disturbs
    seed: int
    clock: str = "wall"
    timeout: float = 400.0
    verbose: bool = False

    def environment(self) -> dict[str, str]:
        """What the peers' libraries read."""
        pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        found = {name: str(self.threads) for name in pools}
        found |= {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore:resource_tracker"}
        # glibc gives freed blocks over 32 MiB back to the system, and page faults on a new result
        # then cost more than its arithmetic; kept memory shows every peer at its best
        keep = {"MMAP_THRESHOLD_": 2**33, "TRIM_THRESHOLD_": 2**33, "TOP_PAD_": 2**28}
        found |= {f"MALLOC_{name}": str(size) for name, size in keep.items()}
        return found | (AVX2_ENVIRONMENT if self.level == "v3" else {})


@dataclass
class Measured:
    """One engine on one workload; `failure` says why there are no times."""

    compile_seconds: float = float("nan")
    error: float = float("nan")
    times: list[float] = field(default_factory=list)  # a median a round
    least: float = float("inf")
    disturbed: int = 0
    failure: str = ""


@dataclass
class Row:
    """All engines on one workload."""

    name: str
    title: str
    sizes: Sizes
    engines: dict[str, Measured]

    @property
    def best(self) -> str | None:
        """The quickest peer by the median."""
        peers = {k: m for k, m in self.engines.items() if m.times and is_peer(k)}
        return min(peers, key=lambda k: median(peers[k].times), default=None)

    def ratio(self, engine: str) -> float:
        """Its time over the best peer's: the median over rounds of the ratio within a round."""
        mine, best = self.engines[engine].times, self.best
        if best is None or not mine:
            return float("nan")
        return median(a / b for a, b in zip(mine, self.engines[best].times, strict=True))

    def least_ratio(self, engine: str) -> float:
        """Its quickest call over the quickest of any peer: what a busy machine blurs least."""
        peers = [m.least for k, m in self.engines.items() if m.times and is_peer(k)]
        return self.engines[engine].least / min(peers, default=float("nan"))


def is_peer(engine: str) -> bool:
    return engine != "stagefuse"


class Process:
    """An engine's process, started when it is first asked for something."""

    def __init__(self, engine: str, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.process: Any = None
        self.connection: Any = None

    def ask(self, *request: Any) -> Any:
        """Its answer, or a Failure."""
        if self.process is None:
            self._start()
        try:
            self.connection.send(request)
            if self.connection.poll(self.settings.timeout):
                return self.connection.recv()
            return self._failed(f"no answer in {self.settings.timeout:g} s")
        except (EOFError, OSError):
            return self._failed("its process died")

    def _start(self) -> None:
        context, settings = get_context("spawn"), self.settings
        self.connection, theirs = context.Pipe()
        arguments = (
            theirs, self.engine, settings.threads, settings.level, settings.clock,
            not settings.verbose,
        )  # fmt: skip
        self.process = context.Process(target=serve, args=arguments)
        self.process.start()
        theirs.close()

    def _failed(self, reason: str) -> Failure:
        self.stop()
        return Failure(reason)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None


@contextmanager
def processes(settings: Settings) -> Iterator[list[Process]]:
    """One for every engine that is installed."""
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(settings.environment())
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        running = [Process(name, settings) for name in settings.engines if ENGINES[name].present]
        try:
            yield running
        finally:
            for process in running:
                process.stop()
            os.environ.clear()
            os.environ.update(kept)


def measure(
    family: Family, sizes: Sizes, running: Sequence[Process], settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> Row:  # fmt: skip
    """Compile and check on every engine, then take the rounds."""
    row = Row(family.name, family.title, sizes, {})
    with tempfile.TemporaryDirectory() as folder:
        workload = family.workload(settings.seed, sizes)
        for number, result in enumerate(workload.reference()):
            np.save(Path(folder) / f"{number:02}.npy", result)
        job = Job(family.name, sizes, settings.seed, folder)
        for process in running:
            progress(f"{family.name}: {process.engine} compiles")
            row.engines[process.engine] = loaded(process.ask("load", job))
    take_rounds(row, running, settings, progress)
    return row


def take_rounds(
    row: Row, running: Sequence[Process], settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> None:  # fmt: skip
    """A batch of each engine that has the row's work ready, and again."""
    ready = [process for process in running if not row.engines[process.engine].failure]
    for number in range(settings.rounds):
        progress(f"{row.name}: round {number + 1} of {settings.rounds}")
        turn = number % max(1, len(ready))
        for process in ready[turn:] + ready[:turn]:
            batch = process.ask("batch", settings.seconds, settings.tries)
            _add(row.engines[process.engine], batch)


def loaded(answer: Loaded | Failure) -> Measured:
    """An engine that is ready, or has failed."""
    if isinstance(answer, Failure):
        return Measured(failure=answer.reason)
    return Measured(answer.compile_seconds, answer.error)


def _add(measured: Measured, answer: Batch | Failure) -> None:
    if isinstance(answer, Failure):
        measured.failure = answer.reason
        measured.times = []
    elif not measured.failure:
        measured.times.append(answer.seconds)
        measured.least = min(measured.least, answer.least)
        measured.disturbed += answer.disturbed
