"""The object loader on good and damaged files, and the thread pool under load."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.cpu.build import build, compile_text, target_machine
from stagefuse.compiler.cpu.pool import MAX_THREADS, STEP_BYTES, pack_steps
from stagefuse.compiler.kernel_ir import Buffer, Const, For, Index, Kernel, Load, Op, Store
from stagefuse.compiler.plan import UNITS
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import F32, I64
from stagefuse.runtime import native
from stagefuse.runtime.native import NativeObject, ObjectError, detect_level

i = sym("i")
COUNT = Kernel(
    "count", (Buffer("x", I64, (sym("N"),), "inout"),), ("N",), (("i", sym("N")),),
    (Store("x", (Index(i),), Op("add", (Load("x", (Index(i),), I64), Const(1, I64)), I64)),),
)  # fmt: skip
CLEAR = Kernel(
    "clear", (Buffer("x", I64, (sym("N"), const(100)), "out"),), ("N",), (("i", sym("N")),),
    (For("j", const(0), const(100),
         (Store("x", (Index(i), Index(sym("j"))), Const(0, I64)),), True),),
)  # fmt: skip


@pytest.fixture(scope="module")
def image() -> bytes:
    return build([COUNT, CLEAR], "v3")


@pytest.fixture(scope="module")
def loaded(image: bytes) -> NativeObject:
    return NativeObject(image)


def runner(loaded: NativeObject) -> Any:
    return loaded.function(
        "sf_run", ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64
    )


class Job:
    """Several steps that each add one to every element of an array."""

    def __init__(self, loaded: NativeObject, size: int, grain: int, steps: int) -> None:
        self.data = np.zeros(size, np.int64)
        self.slots = np.array([self.data.ctypes.data, size], np.int64)
        self.status = np.zeros(4, np.int64)
        step = (loaded.address("count"), self.slots.ctypes.data, size, grain, 0, 0,
                self.status.ctypes.data)  # fmt: skip
        self.count, self.packed = steps, pack_steps([step] * steps)
        assert len(self.packed) == steps * STEP_BYTES


def test_names_and_addresses(loaded: NativeObject) -> None:
    assert {"count", "clear", "sf_run", "sf_pool_stop", "sf_pool_reset"} <= set(loaded.names())
    with pytest.raises(KeyError):
        loaded.address("nothing")


def test_libc_functions_are_reached(loaded: NativeObject) -> None:
    data = np.full((3, 100), 7, np.int64)
    slots = np.array([data.ctypes.data, 3], np.int64)
    call = loaded.function(
        "clear", None, *[ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p] * 1,
        ctypes.c_void_p,
    )  # fmt: skip
    call(slots.ctypes.data, 0, 3, 0, 0)
    assert not data.any()


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 5, 1000])
def test_pool_runs_every_iteration_once(loaded: NativeObject, threads: int) -> None:
    run = runner(loaded)
    for size, grain in ((0, 1), (1, 1), (7, 1), (1000, 1), (1000, 64), (1000, 5000), (9, 0)):
        job = Job(loaded, size, grain, 5)
        assert run(job.packed, job.count, min(threads, 2 * MAX_THREADS)) == 5
        assert (job.data == 5).all()


def test_pool_under_load_from_several_python_threads(loaded: NativeObject) -> None:
    run, failures = runner(loaded), []

    def work(threads: int) -> None:
        for size in (3, 100, 257):
            job = Job(loaded, size, 1, 20)
            for _ in range(30):
                run(job.packed, job.count, threads)
            if not (job.data == 600).all():
                failures.append(job.data)

    workers = [threading.Thread(target=work, args=(2 + k % 3,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_pool_stops_after_a_bad_status_and_can_be_stopped(image: bytes) -> None:
    loaded = NativeObject(image)
    job = Job(loaded, 100, 1, 3)
    run = runner(loaded)
    assert run(job.packed, 3, 2) == 3
    job.status[0] = 1
    assert run(job.packed, 3, 2) == 0 and (job.data == 4).all()
    job.status[0] = 0
    loaded.function("sf_pool_stop", None)()
    assert run(job.packed, 3, 2) == 3 and (job.data == 7).all()
    loaded.close()
    loaded.close()


def test_pool_works_in_a_forked_child(loaded: NativeObject) -> None:
    job, run = Job(loaded, 1000, 1, 10), runner(loaded)
    run(job.packed, 10, 3)
    child = os.fork()
    if child == 0:
        done = run(job.packed, 10, 3)
        os._exit(0 if done == 10 and (job.data == 20).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_loading_needs_no_compiler() -> None:
    code = "import sys, stagefuse.runtime.native; print('llvmlite' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_cut_files_are_refused(image: bytes) -> None:
    for size in [*range(0, 64), *range(64, len(image), 97)]:
        with pytest.raises(ObjectError):
            NativeObject(image[:size])


def test_damaged_headers_are_refused_or_harmless(image: bytes) -> None:
    """Every damaged word of the header and the section table gives an error or a mapping."""
    (start,) = struct.unpack_from("<Q", image, 40)
    rng = np.random.default_rng(1)
    for place in [*range(0, 64, 2), *range(start, len(image) - 4, 4)]:
        broken = bytearray(image)
        broken[place : place + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        try:
            NativeObject(bytes(broken[: len(image)]))
        except (ObjectError, MemoryError):
            pass


def test_random_damage_does_not_end_the_process(image: bytes) -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        broken = bytearray(image)
        for place in rng.integers(0, len(image), 8):
            broken[place] = rng.integers(0, 256)
        try:
            NativeObject(bytes(broken))
        except (ObjectError, MemoryError):
            pass


def test_unknown_functions_are_refused() -> None:
    text = "declare void @system(ptr)\ndefine void @f(ptr %p) {\n" \
           "  call void @system(ptr %p)\n  ret void\n}\n"  # fmt: skip
    with pytest.raises(ObjectError, match="unknown function: 'system'"):
        NativeObject(compile_text(text, "v3"))


def test_levels() -> None:
    v3 = "flags : avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
    assert detect_level(v3) == "v3"
    assert detect_level(v3 + " avx512f avx512bw avx512cd avx512dq avx512vl") == "v4"
    assert detect_level("flags : sse2") is None and detect_level("") is None
    with pytest.raises(ValueError, match="level"):
        target_machine("v5")


@pytest.mark.parametrize(
    ("vendor", "family", "used"),
    [
        ("GenuineIntel", "6", {"pages"}), ("AuthenticAMD", "25", {"quotients"}),
        ("AuthenticAMD", "26", {"pages", "quotients"}), ("HygonGenuine", "24", set()),
    ],
)  # fmt: skip
def test_what_is_measured_to_gain_on_a_processor_is_used_there(
    vendor: str, family: str, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"vendor_id": {vendor}, "cpu family": {family}, "flags": set()}
    monkeypatch.setattr(native, "_own_words", said.__getitem__)
    assert native.units("v4", tiles=False) == sum(UNITS[name] for name in used)
    assert native.units("v3") == sum(UNITS[name] for name in used - {"quotients"})


def test_levels_built_together_are_the_levels_built_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from stagefuse.compiler.cpu import build

    monkeypatch.setattr(build, "ALONE_CHARACTERS", 0)
    monkeypatch.setenv("STAGEFUSE_CACHE", "")
    n = sym("N")
    at = (Index(sym("i")),)
    body = (Store("y", at, Op("exp", (Load("x", at, F32),), F32)),)
    buffers = (Buffer("x", F32, (n,), "in"), Buffer("y", F32, (n,), "out"))
    kernels = [Kernel("k", buffers, ("N",), (("i", n),), body)]
    alone = {level: build.build(kernels, level) for level in build.LEVELS}

    def together(soon: bool) -> dict[str, bytes]:
        running = build.LevelBuild(build.LEVELS, soon)
        running.start(kernels)
        try:
            return running.objects()
        finally:
            running.stop()

    assert together(True) == together(False) == alone
    monkeypatch.setattr(build, "_CHILD", "raise SystemExit(1)")
    assert together(True) == alone
    monkeypatch.setattr(build.sys, "executable", "/nowhere/python")
    assert together(True) == alone


def test_what_was_built_is_not_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from stagefuse.compiler.cpu import build

    monkeypatch.setenv("STAGEFUSE_CACHE", str(tmp_path))
    text = "define void @f(ptr %p) {\n  store <16 x i32> zeroinitializer, ptr %p\n  ret void\n}\n"
    made = compile_text(text, "v3")
    assert compile_text(text, "v4") != made
    with monkeypatch.context() as nothing:
        nothing.setattr(build, "improved", None)
        assert compile_text(text, "v3") == made
        running = build.LevelBuild(("v3", "v4"), soon=True)
        nothing.setattr(build, "module_text", lambda kernels, level: text)
        running.start(())
        assert not running.children and running.objects()["v3"] == made
        with pytest.raises(TypeError):
            compile_text(text, "v3", speed=1)


def test_a_build_that_is_given_up_leaves_no_process() -> None:
    from stagefuse.compiler.cpu import build

    running = build.LevelBuild(build.LEVELS, soon=True)
    (child,) = running.children.values()
    running.stop()
    assert child.process.poll() is not None and child.file.closed


def test_a_process_that_is_stopped_for_a_while_gives_its_whole_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stagefuse.compiler.cpu import build

    script = "{path!r}; {level!r}; import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    monkeypatch.setattr(build, "_CHILD", script)
    text = "x" * 500_000  # more than a pipe holds
    child = build._Child("v3")
    assert child.send(text)
    for signal_number in (signal.SIGSTOP, signal.SIGCONT):
        time.sleep(0.5)
        os.kill(child.process.pid, signal_number)
    assert child.output() == text.encode()
