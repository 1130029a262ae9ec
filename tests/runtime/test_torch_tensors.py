"""Tensors of a PyTorch that is a fake, on the fake GPU: read where they lie, in stream order."""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet, finalize

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.driver import compile_file
from stagefuse.runtime.cuda import torch_tensors
from stagefuse.runtime.devices import open_plan

from .cuda_run import batch, check, opened
from .fake_cuda import FakeCuda
from .fake_tensor import FakeTensor


class Tensor(FakeTensor):
    """What of torch.Tensor is asked for; `__dlpack__` must not be."""

    is_cuda, layout, requires_grad = True, "strided", False
    device = SimpleNamespace(index=0)
    kind = "float32"
    dtype = property(  # type: ignore[assignment]
        lambda self: sys.intern(f"torch.{self.kind}"), lambda *_: None
    )

    def __dlpack__(self, **_: Any) -> FakeTensor:
        raise AssertionError

    def data_ptr(self) -> int:
        if self.layout != "strided":
            raise RuntimeError
        return self.address

    def get_device(self) -> int:
        return self.device.index

    def is_contiguous(self) -> bool:
        return self.strides is None

    def stride(self) -> tuple[int, ...]:
        assert self.strides is not None
        return self.strides


@pytest.fixture()
def torch(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The fake module; `at` is its current stream."""
    fake = SimpleNamespace(Tensor=Tensor, strided="strided", float32="torch.float32")
    fake.at = cuda.foreign_stream()
    fake._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda _: fake.at)

    free: dict[tuple[int, int], list[int]] = {}

    def empty(shape: tuple[int, ...], *, dtype: str, device: Any) -> Tensor:
        """Memory that died on this stream is used again, behind what is on it, as PyTorch does."""
        size = 4 * int(np.prod(shape))
        waiting = free.setdefault((fake.at, size), [])
        address = waiting.pop() if waiting else cuda._allocate(max(size, 1))
        cuda.foreign.add(address)
        made = Tensor(cuda, address, shape, np.float32, None)
        finalize(made, waiting.append, address)
        return made

    def empty_strided(shape: tuple[int, ...], steps: list[int], **options: Any) -> Tensor:
        array = np.empty(shape, np.float32)
        assert not array.size or [4 * n for n in steps] == [*array.strides]
        return empty(shape, **options)

    fake.empty, fake.empty_strided = empty, empty_strided
    monkeypatch.setitem(sys.modules, "torch", fake)  # type: ignore[arg-type]
    torch_tensors._dtypes.clear()
    return fake


def tensor(cuda: FakeCuda, torch: SimpleNamespace, x: np.ndarray[Any, Any]) -> Tensor:
    """Filled by the current stream, with nothing that waits for it."""
    made = cuda.tensor(x, torch.at)
    return Tensor(cuda, made.address, made.shape, made.dtype, None)


def test_they_are_read_behind_the_current_stream(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    with opened("affine") as pipe:
        for _ in range(3):
            x = batch((2, 6))
            outs = tensor(cuda, torch, x), tensor(cuda, torch, x)
            pipe(x=tensor(cuda, torch, x), out=outs)
            found = [cuda.read(o.address, o.shape, np.float32, torch.at) for o in outs]
            check(found, x)
        assert "view" not in cuda.counts


def taken(cuda: FakeCuda, before: dict[str, int]) -> dict[str, int]:
    """What was asked of the driver since then."""
    return {name: n - before.get(name, 0) for name, n in cuda.counts.items() if n > before[name]}


def there(cuda: FakeCuda, arrays: Any, stream: int) -> list[Any]:
    return [cuda.read(a.address, a.shape, np.float32, stream) for a in arrays]


@pytest.mark.parametrize("sequence", [tuple, list])
def test_a_call_again_is_one_launch(
    cuda: FakeCuda, torch: SimpleNamespace, sequence: Callable[[Any], Any]
) -> None:
    x = batch((2, 6))
    with opened("affine") as pipe:
        on, at = pipe.on(torch.at), torch.at
        given, outs = tensor(cuda, torch, x), sequence(tensor(cuda, torch, x) for _ in range(2))
        for _ in range(3):  # from scratch, letting go of its arrays, and of the event for that
            on(x=given, out=outs)
            cuda.finish_all()
        for _ in range(3):
            before = dict(cuda.counts)
            assert on(x=given, out=outs) is outs
            assert taken(cuda, before) == {"replay": 1}
        check(there(cuda, outs, at), x)
        pipe(x=given, out=outs)
        before = dict(cuda.counts)
        pipe(x=given, out=outs)
        assert taken(cuda, before) == {"replay": 1, "finish": 1}
        torch.at = cuda.foreign_stream()  # PyTorch goes on elsewhere: one event orders both
        before = dict(cuda.counts)
        on(x=given, out=outs)
        assert taken(cuda, before) == {"replay": 1, "record": 1, "wait": 1}


def test_calls_again_with_other_tensors(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    """Each of what a call depends on changes, and results are of the tensors given."""
    with opened("affine") as pipe:
        on = pipe.on(torch.at)
        for shape in ((2, 6), (2, 6), (4, 3), (4, 3), (2, 6), (0, 3), (2, 6), (2, 6)):
            x = batch(shape)
            outs = tensor(cuda, torch, x), tensor(cuda, torch, x)
            for call in (on, pipe):
                call(x=tensor(cuda, torch, x), out=outs)
                check(there(cuda, outs, torch.at), x)
                check(there(cuda, call(x=tensor(cuda, torch, x)), torch.at), x)
            check(pipe(x=x), x)
        x = batch((2, 6))
        given = tensor(cuda, torch, x)
        y, z = on(x=given)
        on(x=given, out=(given, z))  # over its input
        check(there(cuda, (given, z), torch.at), x)
        with pytest.raises(sf.InputError, match="share memory"):
            on(x=given, out=(y, y))
        padded = tensor(cuda, torch, np.concatenate([x.reshape(-1)[:3], x.reshape(-1)]))
        padded.address, padded.shape = padded.address + 12, x.shape
        check(there(cuda, on(x=padded), torch.at), x)
        for change in ({"requires_grad": True}, {"strides": (1, 2)}, {"kind": "int32"}):
            on(x=given)
            wrong = tensor(cuda, torch, x)
            vars(wrong).update(change)
            with pytest.raises(sf.InputError):
                on(x=wrong)


@pytest.mark.parametrize("sets", [2, 4, 5])
def test_sets_of_tensors_in_turn(cuda: FakeCuda, torch: SimpleNamespace, sets: int) -> None:
    """Each of a few has a graph of its own as soon as it comes again; of more, one is changed."""
    xs = [batch((2, 6)) for _ in range(sets)]
    every = [[tensor(cuda, torch, x) for _ in range(3)] for x in xs]
    with opened("affine") as pipe:
        on = pipe.on(torch.at)
        for turn in range(5):
            before = dict(cuda.counts)
            for x, (given, *outs) in zip(xs, every, strict=True):
                on(x=given, out=tuple(outs))
                check(there(cuda, outs, torch.at), x)
            if turn > 2:
                assert ("update" in taken(cuda, before)) == (sets > 4)
        assert len(cuda.graphs) == min(sets, 4)


def test_a_tensor_without_an_address_is_not_alike(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    dense, sparse = (tensor(cuda, torch, batch((2, 6))) for _ in range(2))
    sparse.layout = "sparse"
    alike = torch_tensors.alike([dense], 0)
    assert alike is not None and alike.addresses([dense]) == [dense.address]
    assert alike.addresses([sparse]) is None
    assert torch_tensors.alike([dense, batch((2, 6))], 0) is None


def test_tensors_live_until_they_are_used(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    """What a call reads may be dropped at once; its memory is not, until the call is done."""
    alive: WeakSet[Tensor] = WeakSet()
    with opened("affine") as pipe:
        on = pipe.on(cuda.foreign_stream())
        for number in range(6):
            given = tensor(cuda, torch, batch((2, 6)))
            alive.add(given)
            on(x=given)
            del given
            assert len(alive) == number + 1
        cuda.finish_all()
        for _ in range(2):
            on(x=tensor(cuda, torch, batch((2, 6))))
        assert not alive


def test_any_order_of_tensors(
    cuda: FakeCuda, torch: SimpleNamespace, chance: random.Random, rng: np.random.Generator
) -> None:
    """Tensors come and go on PyTorch's streams and beside them, and their memory is used again:
    the fake would see a write that nothing orders behind a call that still reads."""
    streams = [cuda.foreign_stream() for _ in range(2)]

    def filled(x: np.ndarray[Any, Any]) -> Tensor:
        made: Tensor = torch.empty(x.shape, dtype="torch.float32", device=None)
        block, begin = cuda._at(made.address, x.nbytes)

        def run() -> None:
            block.bytes[begin : begin + x.nbytes] = x.reshape(-1).view(np.uint8)
            block.known[begin : begin + x.nbytes] = True

        cuda._enqueue(torch.at, run, [(block, begin, begin + x.nbytes, "write")])
        return made

    with opened("affine") as pipe:
        calls: list[Any] = [pipe, *map(pipe.on, streams)]
        kept: list[Any] = []
        for _ in range(80):
            x = rng.standard_normal(chance.choice([(2, 6), (2, 6), (3, 3)]), np.float32)
            torch.at, call = chance.choice(streams), chance.choice(calls)
            given, outs = filled(x), (filled(x), filled(x))
            for _ in range(chance.randrange(1, 4)):
                found = call(x=given, out=outs) if chance.random() < 0.5 else call(x=given)
            kept.append((found, x))
            if chance.random() < 0.5:
                del kept[chance.randrange(len(kept))]
            del given, outs, found
        for stream in streams:
            cuda._finish(cuda.streams[stream])
        for found, x in kept:
            check(there(cuda, found, streams[0]), x)


def test_what_is_bound_to_a_stream(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    """Its memory is its own while it lives, and the pipeline's when it is dropped."""
    x = batch((2, 6))
    with opened("affine") as pipe:
        one, other = pipe.on(cuda.foreign_stream()), pipe.on(cuda.foreign_stream())
        results = [call(x=tensor(cuda, torch, x)) for call in (one, other, one, other)]
        assert len(pipe._spaces) == 2
        del one, other
        for _ in range(3):
            results.append(pipe.on(cuda.foreign_stream())(x=tensor(cuda, torch, x)))
            check(pipe(x=x), x)
        kept = pipe.on(torch.at)
        kept(x=tensor(cuda, torch, x))
    with pytest.raises(sf.InputError, match="closed"):
        kept(x=x)


def test_indices_are_looked_at_again(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    with opened("lookup") as pipe:
        table = batch((5,))
        ids = [np.array([4, 0]), np.array([1, 5]), np.array([2, 2])]
        at = tensor(cuda, torch, table)
        tensors = [tensor(cuda, torch, i) for i in ids]
        for t in tensors:
            t.kind = "int64"
        for call in (pipe, pipe.on(torch.at)):
            for _ in range(2):
                for one, t in zip(ids, tensors, strict=True):
                    if 5 in one:
                        with pytest.raises(sf.IndexOutOfRange, match="it is 5"):
                            call(table=at, ids=t)
                    else:
                        (found,) = there(cuda, [call(table=at, ids=t)], torch.at)
                        np.testing.assert_array_equal(found, table[one])


def test_what_is_refused(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    with opened("affine") as pipe:
        x = tensor(cuda, torch, batch((6, 3)))
        x.requires_grad = True
        with pytest.raises(sf.InputError, match="input `x`: this tensor requires a gradient"):
            pipe(x=x)
        x.requires_grad, x.kind = False, "complex64"
        with pytest.raises(sf.InputError, match="torch.complex64 is no dtype"):
            pipe(x=x)
        x.kind = "int32"
        with pytest.raises(sf.InputError, match="dtype i32"):
            pipe(x=x)
        x.kind, x.shape, x.strides = "float32", (3, 6), (1, 3)
        with pytest.raises(sf.InputError, match="dense"):
            pipe(x=x)
        x.device = SimpleNamespace(index=1)
        with pytest.raises(sf.InputError, match="memory of cuda:1"):
            pipe(x=x)


def test_a_space_grows_while_it_is_used(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    with opened("affine") as pipe:
        on, found = pipe.on(cuda.foreign_stream()), []
        for rows in (1, 20, 3, 64, 64, 1):
            x = batch((rows, 9))
            found.append((on(x=tensor(cuda, torch, x)), x))
        for results, x in found:
            check(there(cuda, results, on.stream), x)


def test_what_pytorch_has_no_memory_for(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    class OutOfMemoryError(RuntimeError):
        """PyTorch's own."""

    is_full = False

    def limited(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> Any:
            if is_full:
                raise OutOfMemoryError("CUDA out of memory. Tried 9 GiB. GPU 0 has a total of 1")
            return make(*args, **options)

        return made

    torch.cuda = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    torch.empty, torch.empty_strided = map(limited, (torch.empty, torch.empty_strided))
    x = batch((2, 6))
    with opened("affine") as pipe:
        for is_full in (False, False, True, False):
            given = tensor(cuda, torch, x)
            if not is_full:
                check(there(cuda, pipe(x=given), torch.at), x)
                continue
            for other in (given, tensor(cuda, torch, batch((3, 9)))):
                with pytest.raises(sf.OutOfMemory, match=r"Tried 9 GiB\.$"):
                    pipe(x=other)


def test_a_failed_launch_leaves_the_pipeline_usable(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    x = batch((2, 6))
    with opened("affine") as pipe:
        for call in (pipe, pipe.on(torch.at), pipe.on(cuda.foreign_stream())):
            for where in ("replay", "update", "record"):
                call(x=tensor(cuda, torch, x))
                call(x=tensor(cuda, torch, x))
                cuda.fail[where] = sf.DeviceError("no")
                stream = getattr(call, "stream", torch.at)
                if where != "record" or stream != torch.at:  # where nothing is to be ordered
                    with pytest.raises(sf.DeviceError, match="no"):
                        call(x=tensor(cuda, torch, x))
                cuda.fail.clear()
                found = call(x=tensor(cuda, torch, x))
                check(there(cuda, found, stream), x)


def test_sessions_of_tensors(cuda: FakeCuda, torch: SimpleNamespace, tmp_path: Path) -> None:
    """A call again is one of the same session; their states do not mix, and die with them."""
    path = tmp_path / "p.pipe"
    path.write_text(
        "pipeline p(x: f32[D]) -> f32[D] where D in 1..=9:\n"
        "    state total: f32[D] = 0.0\n    total = total + x\n    total\n"
    )
    plan = replace(compile_file(path, targets=("h100",), levels=()), cubins={})
    with open_plan(plan, None, "cuda:0") as pipe:
        sessions = [pipe.session(D=5), pipe.session(D=5)]
        sums = [np.zeros(5, np.float32), np.zeros(5, np.float32)]
        for number in (0, 0, 0, 1, 0, 1, 1, 1, 0):
            x = batch((5,))
            sums[number] += x
            found = sessions[number](x=tensor(cuda, torch, x))
            np.testing.assert_array_equal(*there(cuda, [found], torch.at), sums[number])
        sessions[0].reset()
        for _ in range(2):
            sessions[0](x=tensor(cuda, torch, x))
        (found,) = there(cuda, [sessions[0](x=tensor(cuda, torch, x))], torch.at)
        np.testing.assert_allclose(found, 3 * x, rtol=1e-6)
        before = cuda.leaks()["blocks"]
        sessions.clear()
        gc.collect()
        assert cuda.leaks()["blocks"] == before - 2
        with pytest.raises(sf.InputError, match="session"):
            pipe(x=tensor(cuda, torch, x))


def test_threads_share_what_is_bound_to_a_stream(cuda: FakeCuda, torch: SimpleNamespace) -> None:
    failures: list[BaseException] = []
    with opened("affine") as pipe:
        on = pipe.on(torch.at)

        def work(rows: int) -> None:
            try:
                for _ in range(8):
                    x = batch((rows, 6))
                    with cuda._lock:  # the fake's own, for what is no call of the driver's
                        given = tensor(cuda, torch, x)
                    results = on(x=given)
                    with cuda._lock:
                        check(there(cuda, results, torch.at), x)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(1 + n % 2,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
