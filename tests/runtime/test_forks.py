"""Children made by `fork`: they call whatever threads of their parent were doing."""

from __future__ import annotations

import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from stagefuse.runtime import forks
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from . import handmade


@pytest.fixture(scope="module")
def lookup() -> Iterator[CpuPipeline]:
    with CpuPipeline(handmade.plan(), "lookup") as pipeline:
        yield pipeline


def in_a_child(work: Callable[[], bool]) -> int:
    """How a child process ends that does some work; -1 if it hangs."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    for _ in range(1000):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.parametrize("lock", ["_pool._lock", "_lock", "_native_lock"])
def test_a_child_calls_whatever_threads_of_its_parent_do(lock: str, lookup: CpuPipeline) -> None:
    """Results are large: their memory is from a pool."""
    given = {"table": np.linspace(-1, 1, 4, dtype=np.float32), "ids": np.arange(50_000) % 4}
    expected, held = given["table"][given["ids"]], threading.Event()

    def hold() -> None:
        with operator.attrgetter(lock)(lookup):
            held.set()
            time.sleep(0.05)

    def results() -> bool:
        found = lookup.submit(**given).result(2), lookup(**given)
        return all(np.array_equal(x, expected) for x in found)

    lookup.submit(**given).result()  # by a thread that a child has not
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    assert in_a_child(results) == 0
    holder.join()


def test_locks_are_made_while_a_thread_forks() -> None:
    """Those that were there before are taken all the same."""
    there, ended = [forks.lock() for _ in range(1000)], threading.Event()

    def make() -> None:
        while not ended.is_set():
            kept = [forks.lock() for _ in range(100)]
            kept.clear()

    maker, before = threading.Thread(target=make), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    maker.start()
    try:
        for _ in range(50):
            forks._before()
            taken = {id(x) for x in forks._forking.held}
            forks._after()
            assert taken >= {id(x) for x in there}
    finally:
        sys.setswitchinterval(before)
        ended.set()
        maker.join()
