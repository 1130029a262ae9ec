"""A call of the driver fails: the error reaches who called, what failed works when it is tried
again, and nothing is left behind on the device."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import stagefuse as sf
from stagefuse.runtime.device_pipeline import DevicePipeline

from .cuda_run import batch, check, opened, standing_in
from .fake_cuda import FakeCuda

GIVES_BACK = ("free", "unpin", "close_stream", "close_event", "close_graph", "unload")


class Failing(FakeCuda):
    """The fake GPU, of whose calls, or those of a name, number `at` fails."""

    def __init__(self, at: int, name: str = "") -> None:
        super().__init__()
        self.at, self.only, self.made, self.failed = at, name, 0, ""

    @contextmanager
    def _entered(self, name: str) -> Iterator[None]:
        if self.only in ("", name):
            if self.made == self.at:
                self.failed = name
                kind = sf.OutOfMemory if name in ("allocate", "pin") else sf.DeviceError
                self.fail[name] = kind(f"{name} failed")
            self.made += 1
        with super()._entered(name):
            yield


def calls(pipe: DevicePipeline, cuda: FakeCuda) -> None:
    for shape in ((2, 6), (4, 3)):
        x = batch(shape)
        check(pipe(x=x), x)


def tensors(pipe: DevicePipeline, cuda: FakeCuda) -> None:
    for shape in ((2, 6), (4, 3), (4, 3)):
        x = batch(shape)
        check(pipe(x=cuda.tensor(x)), x)


def outs(pipe: DevicePipeline, cuda: FakeCuda) -> None:
    x = batch((2, 6))
    like = pipe(x=x)
    for _ in range(2):
        out = tuple(cuda.tensor(a) for a in like)
        pipe(x=cuda.tensor(x), out=out)
        check([t.numpy(cuda.foreign_stream()) for t in out], x)


def batches(pipe: DevicePipeline, cuda: FakeCuda) -> None:
    xs = [batch(shape) for shape in ((2, 6), (4, 3), (2, 6))]
    for x, found in zip(xs, pipe.map(({"x": x} for x in xs), depth=2), strict=True):
        check(found, x)


def streams(pipe: DevicePipeline, cuda: FakeCuda) -> None:
    on = pipe.on(cuda.foreign_stream())
    for shape in ((2, 6), (4, 3)):
        x = batch(shape)
        check(on(x=cuda.tensor(x)), x)


USES = {f.__name__: f for f in (calls, tensors, outs, batches, streams)}


def used(use: str, fake: Failing) -> None:
    """Opens a pipeline and uses it, again where that failed."""

    def works_or_tells(pipe: DevicePipeline) -> None:
        try:
            USES[use](pipe, fake)
        except (sf.DeviceError, sf.OutOfMemory) as error:
            assert str(error) == f"{fake.failed} failed"
            USES[use](pipe, fake)

    try:
        with opened("affine") as pipe:
            works_or_tells(pipe)
        del pipe
    except (sf.DeviceError, sf.OutOfMemory) as error:
        assert str(error) == f"{fake.failed} failed"
    gc.collect()
    assert fake.faults == []
    if fake.failed not in GIVES_BACK:
        assert fake.leaks() == {}


@pytest.mark.parametrize("use", USES)
def test_any_call(
    use: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, chance: random.Random
) -> None:
    standing_in(monkeypatch, fake := Failing(-1))
    used(use, fake)
    for number in chance.sample(range(fake.made), 4):
        standing_in(monkeypatch, fake := Failing(number))
        used(use, fake)
        assert fake.failed


@pytest.mark.parametrize(
    "use, name, number",
    [("batches", "stream", 2), ("batches", "stream", 3), ("batches", "event", 1),
     ("batches", "event", 2), ("tensors", "wait", 3)],
)  # fmt: skip
def test_what_a_failing_call_had_made_is_given_back(
    use: str, name: str, number: int, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams and lanes of `map`, and memory of a result that was to be used again."""
    standing_in(monkeypatch, fake := Failing(number, name))
    used(use, fake)
    assert fake.failed == name and fake.leaks() == {}
