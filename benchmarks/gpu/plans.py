"""Workloads and sources compiled for a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stagefuse.compiler.plan import Plan

from ..workload import PIPES, Workload


def plan_of(workload: Workload, arch: str) -> Plan:
    """The plan of a workload with code for one arch and none for the CPU."""
    from stagefuse.compiler import driver, front
    from stagefuse.dsl.source import Source

    given = {"w": workload.weights} if workload.weights else {}
    source = Source(f"{workload.family.pipe}.pipe", workload.source())
    program, found, load = front.check_text(source, PIPES, given)
    if found:
        raise ValueError("\n".join(str(f) for f in found))
    return driver.compile_program(program, load, None, levels=(), targets=(arch,))


def plans_of(sources: Sequence[tuple[str, Mapping[str, Any]]], arch: str) -> list[Plan | Exception]:
    """The plans of source texts and their constants, each compiled in a process of its own where
    there are cores; what fails is given as it is."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(_plan_of_source, arch=arch), sources))


def _plan_of_source(source: tuple[str, Mapping[str, Any]], arch: str) -> Plan | Exception:
    from stagefuse.compiler.driver import compile_file

    text, weights = source
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "p.pipe")
            path.write_text(text)
            given = {"w": weights} if weights else {}
            return compile_file(path, levels=(), targets=(arch,), weights=given)
    except Exception as failure:
        return RuntimeError(str(failure))
