"""A workload compiled for a GPU."""

from __future__ import annotations

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
