"""Times of a pipeline's steps as a Chrome trace (JSON), which Perfetto and chrome://tracing open.

Steps run one at a time, so a step's time includes waking the threads. Memory for intermediates is
at hand before the first call, as it is in a pipeline that has been called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .memory import point_to
from .prepared import Bound, Bucket, Workspace
from .session import HostStates, Session

if TYPE_CHECKING:
    from .cpu_pipeline import CpuPipeline
    from .pipeline import Pipeline

_RECORD_BYTES = 56


def write_trace(
    pipeline: CpuPipeline, path: Path, calls: int, inputs: dict[str, Any], session: Session | None
) -> Path:
    """Run `calls` calls step by step and write their trace."""
    if calls < 1:
        raise InputError(f"calls is {calls}, but at least one is needed")
    if not inputs:
        inputs = invented(pipeline, session)
    arrays, _ = pipeline._bind((), inputs)
    bucket = pipeline._bucket(arrays, session)
    events = names_of(pipeline, f"steps, {pipeline.threads} threads")
    workspace = Workspace()
    workspace.touch(bucket)
    origin = perf_counter_ns()
    for call in range(calls):
        events += _call(pipeline, workspace, bucket, arrays, session, call, origin)
    document = {
        "displayTimeUnit": "ns",
        "traceEvents": events,
        "otherData": {"sizes": bucket.dims, "threads": pipeline.threads},
    }
    path.write_text(json.dumps(document, default=str), encoding="utf-8")
    return path


def names_of(pipeline: Pipeline, what: str) -> list[dict[str, Any]]:
    """The events that name the process and its only thread."""
    return [
        {
            "ph": "M", "pid": os.getpid(), "tid": 0, "name": "process_name",
            "args": {"name": f"stagefuse {pipeline.signature}"},
        },
        {
            "ph": "M", "pid": os.getpid(), "tid": 0, "name": "thread_name", "args": {"name": what},
        },
    ]  # fmt: skip


def _call(
    pipeline: CpuPipeline,
    workspace: Workspace,
    bucket: Bucket,
    arrays: list[np.ndarray[Any, Any]],
    session: Session | None,
    call: int,
    origin: int,
) -> list[dict[str, Any]]:
    results = pipeline._fresh(bucket)
    bound = workspace.bind(bucket)
    states: list[np.ndarray[Any, Any]] = []
    if session is not None and isinstance(session.states, HostStates):
        states = session.states.arrays
    values = [*arrays, *results, *states]
    point_to(bound.args, bucket.slots, values)
    run = pipeline._loaded().run
    times = [perf_counter_ns()]
    order: list[int] = []
    for number in _turns(bucket, bound, 0, bound.count):
        run(bound.address + number * _RECORD_BYTES, 1, pipeline.threads)
        order.append(number)
        times.append(perf_counter_ns())
    pipeline._finish(workspace, bucket)
    events = [event(f"call {call}", times[0], times[-1], origin, {"call": call})]
    numbers = {id(step): n for n, step in enumerate(pipeline._plan.steps)}
    for place, number in enumerate(order):
        step = bucket.labels[number]
        assert step is not None
        notes = {
            "kernel": step.symbol,
            "step": numbers[id(step)],
            "iterations": int(bucket.records[number, 2]),
            "grain": int(bucket.records[number, 3]),
            **step.report,
        }
        name = step.label or step.symbol
        events.append(event(name, times[place], times[place + 1], origin, notes))
    return events


def _turns(bucket: Bucket, bound: Bound, first: int, end: int) -> Iterator[int]:
    """The records of kernels in the order in which they run, loops turn by turn."""
    while first < end:
        loops = [n for n in bucket.loops if n.first == first and n.end < end]
        if not loops:
            yield first
            first += 1
            continue
        loop = loops[-1]  # the outermost: it was recorded after those inside it
        for turn in range(loop.count):
            for slot in loop.slots:
                bound.args[slot] = turn
            yield from _turns(bucket, bound, loop.first, loop.end)
        first = loop.end + 1


def event(name: str, begin: int, end: int, origin: int, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "step", "pid": os.getpid(), "tid": 0, "name": name,
        "ts": (begin - origin) / 1e3, "dur": (end - begin) / 1e3, "args": args,
    }  # fmt: skip


def invented(pipeline: Pipeline, session: Session | None) -> dict[str, Any]:
    """Inputs with the sizes of the latest new call, or with moderate ones in the ranges."""
    from .pipeline import example_inputs
    from .prepared import Evaluator

    values = dict(pipeline._last or {})
    if session is not None:
        values.update(session.sizes)
    for dim in pipeline._plan.dims:
        if dim.name not in values:
            evaluate = Evaluator(values)
            try:
                low = evaluate(dim.low)
                high = 16 if dim.high is None else evaluate(dim.high)
            except KeyError:
                raise InputError("pass inputs to profile: sizes can't be invented") from None
            values[dim.name] = max(low, min(high, 16))
    return example_inputs(pipeline._plan, values)
