"""A process that holds one engine: it compiles workloads, checks them, times batches of calls."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .engines import ENGINES, Bound
from .workload import Sizes
from .workloads import FAMILIES

DISTURBED = 0.02  # of a batch's time, spent waiting for a core
CHUNKS = 15  # of a batch, timed one by one; their median is the batch's time
# cpu: of all threads of the process, which a busy machine does not lengthen
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
SHORTEST = 50e-6  # seconds of a chunk, so that reading the clock does not count


@dataclass(frozen=True)
class Job:
    """One workload for every engine."""

    family: str
    sizes: Sizes
    seed: int
    reference: str  # the folder of the float64 results


@dataclass(frozen=True)
class Loaded:
    compile_seconds: float  # with the first call
    error: float


@dataclass(frozen=True)
class Batch:
    """A batch's median call, its quickest, and whether its process waited for a core."""

    seconds: float
    least: float
    disturbed: bool


@dataclass(frozen=True)
class Failure:
    reason: str


@dataclass
class Session:
    """The engine of this process, with the workload it has at present."""

    engine: str
    threads: int
    level: str
    clock: str = "wall"
    bound: Bound | None = field(default=None)

    def load(self, job: Job) -> Loaded:
        """Compile, run once and compare with float64. Raises ValueError where it is wrong."""
        self.bound = None
        workload = FAMILIES[job.family].workload(job.seed, job.sizes)
        engine = ENGINES[self.engine].load()(self.threads, self.level)
        start = time.perf_counter()
        bound = engine.bind(workload)
        results = bound.run()
        seconds = time.perf_counter() - start
        reference = [np.load(path) for path in sorted(Path(job.reference).glob("*.npy"))]
        error = workload.error(bound.arrays(results), reference)
        if not error <= workload.family.tolerance:
            raise ValueError(f"wrong: off by {error:.1e}")
        self.bound = bound
        return Loaded(seconds, error)

    def open(self, home: str, name: str) -> Loaded:
        """Compile what one of this package's modules calls by a name, and run it once."""
        bound = import_module(f".{home}", __package__).bound
        self.bound = None
        start = time.perf_counter()
        found = bound(self.engine, name, self.threads, self.level)
        found.run()
        self.bound = found
        return Loaded(time.perf_counter() - start, 0.0)

    def batch(self, seconds: float, tries: int) -> Batch:
        """The least disturbed of some batches, or the first undisturbed one."""
        assert self.bound is not None
        run, best = self.bound.run, (np.inf, Batch(np.inf, np.inf, True))
        clock = CLOCKS[self.clock]
        for number in range(tries):
            time.sleep(0.02 * 2**number)  # threads of the others, still spinning, come to rest
            run()
            start = clock()
            run()
            once = clock() - start
            waited, start = waiting(), time.perf_counter()
            times = _timed(run, clock, once, seconds)
            part = (waiting() - waited) / (time.perf_counter() - start)
            found = Batch(median(times), min(times), part >= DISTURBED)
            best = min(best, (part, found), key=lambda pair: pair[0])
            if not found.disturbed or self.clock == "cpu":
                break
        return best[1]


def _timed(run: Any, clock: Callable[[], float], once: float, seconds: float) -> list[float]:
    """Seconds of a call, one figure for each of some chunks of calls."""
    calls = max(1, int(SHORTEST / once), int(seconds / CHUNKS / once))
    chunks = max(1, min(CHUNKS, int(seconds / (calls * once))))
    times = []
    for _ in range(chunks):
        start = clock()
        for _ in range(calls):
            run()
        times.append((clock() - start) / calls)
    return times


def waiting() -> float:
    """Seconds that this process's threads have waited for a core, and the machine's stolen time."""
    nanoseconds = 0
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # a thread that has ended
            text = Path(f"/proc/self/task/{task}/schedstat").read_text()
            nanoseconds += int(text.split()[1])
    stolen = int(Path("/proc/stat").read_text().split(None, 9)[8])
    return nanoseconds / 1e9 + stolen / os.sysconf("SC_CLK_TCK")


def serve(
    connection: Any, engine: str, threads: int, level: str, clock: str, quiet: bool
) -> None:  # fmt: skip
    """Answer ("load", job) and ("batch", seconds, tries) until the other side is gone."""
    if quiet:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    session = Session(engine, threads, level, clock)
    while True:
        try:
            what, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(session, what)(*arguments)
        except Exception as error:  # the engine is named as failed, and the others go on
            answer = Failure(f"{type(error).__name__}: {str(error).strip()[:400]}")
        connection.send(answer)
