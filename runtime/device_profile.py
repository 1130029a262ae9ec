"""Times of a pipeline's launches on a device as a Chrome trace (JSON), which Perfetto opens.

Launches run one at a time, so a launch's time includes putting it on the stream and waiting.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from .device_prepared import DeviceBucket
from .device_states import DeviceStates
from .drivers import Region
from .errors import InputError
from .profile import event, invented, names_of
from .session import Session

if TYPE_CHECKING:
    from .device_pipeline import DevicePipeline


def write_trace(
    pipeline: DevicePipeline,
    path: Path,
    calls: int,
    inputs: dict[str, Any],
    session: Session | None,
) -> Path:
    """Run `calls` calls launch by launch and write their trace."""
    if calls < 1:
        raise InputError(f"calls is {calls}, but at least one is needed")
    operands, _ = pipeline._bind((), inputs or invented(pipeline, session))
    pipeline._require_open()
    bucket = pipeline._bucket(operands, session)
    states: dict[int, Region] = {}
    if session is not None and isinstance(session.states, DeviceStates):
        states.update(zip(pipeline._preparer.states, session.states.regions, strict=True))
    with pipeline.driver.active():
        events = _measured(pipeline, bucket, operands, states, calls)
    document = {
        "displayTimeUnit": "ns",
        "traceEvents": events,
        "otherData": {"sizes": bucket.dims, "device": pipeline.device},
    }
    path.write_text(json.dumps(document, default=str), encoding="utf-8")
    return path


def _measured(
    pipeline: DevicePipeline,
    bucket: DeviceBucket,
    operands: list[Any],
    states: dict[int, Region],
    calls: int,
) -> list[dict[str, Any]]:
    driver = pipeline.driver
    space = pipeline.new_space()
    events = names_of(pipeline, f"launches on {pipeline.device}")
    try:
        space.reserve(bucket)
        for number, operand in zip(pipeline._preparer.inputs, operands, strict=True):
            if operand.nbytes:
                driver.copy_in(space.region(bucket, number), operand, space.stream)
        graphs = [driver.graph([n]) for n in space.single_launches(bucket, states)]
        starts = [driver.launcher(graph) for graph in graphs]
        driver.finish(space.stream)
        try:
            origin = perf_counter_ns()
            for call in range(calls):
                times = [perf_counter_ns()]
                for start in starts:
                    start(space.stream)
                    driver.finish(space.stream)
                    times.append(perf_counter_ns())
                events.append(event(f"call {call}", times[0], times[-1], origin, {"call": call}))
                for number, launch in enumerate(bucket.launches):
                    notes = {
                        "kernel": launch.plan.kernel, "grid": launch.grid,
                        "block": launch.plan.block, **launch.plan.report,
                    }  # fmt: skip
                    name = launch.plan.label or launch.plan.kernel
                    events.append(event(name, times[number], times[number + 1], origin, notes))
        finally:
            for graph in graphs:
                driver.close_graph(graph)
    finally:
        space.close()
    return events
