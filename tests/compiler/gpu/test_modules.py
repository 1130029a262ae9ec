"""Modules for all arches: assembled without spills, the same each time, and what reports say."""

from __future__ import annotations

import os
import random
import re
import zipfile
from pathlib import Path

import pytest

from stagefuse.compiler import plan_file
from stagefuse.compiler.errors import InternalError
from stagefuse.compiler.gpu import modules
from stagefuse.compiler.gpu.assemble import Usage, assemble, read_usage
from stagefuse.compiler.gpu.emit import Entry
from stagefuse.compiler.gpu.index import divided
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.predict import largest, predict
from stagefuse.compiler.gpu.targets import ARCHES, TARGETS, occupancy, predicted
from stagefuse.compiler.gpu.teams import Team
from stagefuse.dsl.dims import const

from .gpu_run import check_legal, compiled, launches

TEXT = """import nn

pipeline block(x: f32[B, T, 384], w: f32[1536, 384], b: f32[1536], g: f32[384]) -> (
    f32[B, T, 1536], f32[B, T, 384], f32[384], i64[B, T, 5])
where B in 1..=64, T in 1..=512:
    m = mean(x, axis=-1, keepdims=True)
    y = (x - m) * rsqrt(var(x, axis=-1, keepdims=True) + 1e-5) * g
    s, order = topk(reshape(x[:, :, :7], [B, T, 7]), 5)
    nn.gelu(y @ transpose(w, [1, 0]) + b), y, sum(x, axis=(0, 1)), order
"""


def test_kernels_assemble_for_every_arch_without_spills(tmp_path: Path) -> None:
    plan = compiled(tmp_path / "p.pipe", TEXT)
    check_legal(plan)
    assert list(plan.ptx) == list(plan.cubins) == list(ARCHES)
    for launch in launches(plan):
        report = launch.report
        assert report["spill bytes"] == 0, launch.kernel
        entry = f".entry {launch.kernel}("
        wide = "wgmma" in plan.ptx["sm_90a"].partition(entry)[2].partition(".entry")[0]
        assert 0 < report["registers"] <= (255 if wide else 168)
        assert 0 < report["occupancy"] <= 1
        assert report["arithmetic"] in ("f32", "tf32")


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (compiled(tmp_path / "p.pipe", TEXT) for _ in range(2))
    assert dict(first.ptx) == dict(second.ptx)
    assert dict(first.cubins) == dict(second.cubins)
    assert first.pipelines == second.pipelines


def test_kernels_are_assembled_in_parts_once_for_arches_of_one_major_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compiled(tmp_path / "p.pipe", TEXT)
    monkeypatch.setattr(modules, "PART", 500)
    plan = compiled(tmp_path / "p.pipe", TEXT)
    assert plan.ptx == whole.ptx and plan.pipelines == whole.pipelines
    assert plan.cubins["sm_80"] == plan.cubins["sm_89"]
    said = {g.arch: {x.report.get("code of") for x in g.launches} for g in plan.pipelines[0].gpu}
    assert said == {"sm_80": {None}, "sm_89": {"sm_80"}, "sm_90a": {None}}
    assert len(plan.cubins["sm_90a"]) > len(whole.cubins["sm_90a"])
    for arch, cubins in plan.cubins.items():
        found = [name for cubin in cubins for name in cubin.kernels]
        assert sorted(found) == sorted(re.findall(r"\.entry (\w+)", plan.ptx[arch]))
    path = tmp_path / "p.fused"
    plan_file.write(plan, path)
    assert plan_file.read(path).cubins == plan.cubins
    with zipfile.ZipFile(path) as archive:
        members = [n for n in archive.namelist() if n.endswith(".cubin")]
    assert len(members) == len(plan.cubins["sm_80"]) + len(plan.cubins["sm_90a"])


def test_a_module_that_ptxas_refuses_is_quoted(tmp_path: Path) -> None:
    running = modules.Modules(("sm_80",), "p.pipe")
    entry = Entry("p_0", ".visible .entry p_0()\n{\n\tnonsense;\n}", Team(1, 32), const(1),
                  const(0), None, frozenset())  # fmt: skip
    running.add(("sm_80",), entry)
    running.start()
    with pytest.raises(InternalError, match=r"refused a module for sm_80:\n(.|\n)*nonsense"):
        running.wait()
    running.stop()


def test_room_that_is_given_is_there() -> None:
    """A block with more registers than an SM has would not be launched."""
    for hint, threads in modules.ROOM:
        directive, count = hint.split()
        each = int(count) if directive == ".maxnreg" else 1
        assert all(threads * each <= arch.registers for arch in ARCHES.values())


def test_what_a_vector_is_stored_from_is_read_once(tmp_path: Path) -> None:
    """Sums that lie in shared memory, for elements that are stored together."""
    text = "pipeline p(x: f32[N, 64], w: f32[64, 128]) -> f32[N, 128]:\n    x @ w\n"
    lines = compiled(tmp_path / "p.pipe", text, ("sm_80",)).ptx["sm_80"].splitlines()
    stores = [n for n, line in enumerate(lines) if "st.global.v4.f32" in line]
    assert stores
    ends = [n for n, line in enumerate(lines) if re.search(r"\bst\.|\bbar\.|^\$", line)]
    for end in stores:
        begin = max(n for n in ends if n < end)
        read = re.findall(r"ld\.shared\.v4\.f32 .*, (\[.*\]);", "\n".join(lines[begin:end]))
        assert len(read) == len(set(read)) == 1


def test_texts_differ_between_arches_only_in_their_target_and_products(tmp_path: Path) -> None:
    texts = compiled(tmp_path / "p.pipe", TEXT).ptx
    bodies = [text.replace(f".target {arch}\n", "") for arch, text in texts.items()]
    assert bodies[0] == bodies[1]
    assert ["wgmma" in body for body in bodies] == [False, False, True]


def test_names_lines_and_comments_are_those_of_the_source(tmp_path: Path) -> None:
    text = compiled(tmp_path / "p.pipe", TEXT, ("sm_80",)).ptx["sm_80"]
    assert ".visible .entry block_" in text
    assert re.search(r"// node \d+: \w+ f32\[B, T\], line 6", text)
    assert ".loc 1 7 0" in text


def test_assembled_modules_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGEFUSE_CACHE", str(tmp_path / "kept"))
    plan = compiled(tmp_path / "p.pipe", "pipeline p(x: f32[N]) -> f32[N]:\n    x + 1.0\n")
    kept = sorted(os.listdir(tmp_path / "kept"))
    assert len([n for n in kept if n.startswith("cubin-")]) == 2  # one of them for two arches
    text = plan.ptx["sm_80"]
    made = assemble("sm_80", text)
    assert made.cubin == plan.cubins["sm_80"][0].code
    assert sorted(os.listdir(tmp_path / "kept")) == kept
    for name in kept:  # a damaged file is not taken
        (tmp_path / "kept" / name).write_bytes(b"{}")
    assert assemble("sm_80", text) == made


def test_what_ptxas_says_is_read() -> None:
    said = """ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem
"""
    assert read_usage(said) == {"a": Usage(40, 4, 12, 8, 512)}


@pytest.mark.parametrize("kind", ["i32", "i64"])
def test_division_by_a_constant_is_a_product(kind: str, chance: random.Random) -> None:
    """What the instructions compute, followed by hand, for numbers at all ends."""
    bits = 32 if kind == "i32" else 64
    for _ in range(200):
        number = chance.choice([3, 5, 7, 48, 384, 641, 30522, (1 << 30) + 1])
        number = max(number + chance.randrange(9), 3)
        code = Code()
        divided(code, Value(code, "%x", kind), number)
        lines = [x.strip() for x in code.text()]
        for x in (0, 1, number - 1, number, (1 << (bits - 1)) - 1,
                  chance.randrange(1 << (bits - 1))):  # fmt: skip
            assert _run(lines, x, bits) == x // number, (number, x, lines)


def _run(lines: list[str], x: int, bits: int) -> int:
    values = {"%x": x}
    result = 0
    for line in lines:
        op, rest = line.rstrip(";").split(None, 1)
        target, *operands = [t.strip() for t in rest.split(",")]
        a, b = (values[t] if t in values else int(t) for t in operands)
        if op.startswith("mul.hi"):
            result = (a * b) >> bits
        elif op.startswith("shr"):
            result = a >> b
        else:
            result = a // b
        values[target] = result
    return result


def test_occupancy_of_known_kernels() -> None:
    """By the rules of the occupancy tables: registers, shared memory, threads and blocks."""
    assert occupancy(ARCHES["sm_80"], 256, 32, 0) == (8, "threads")
    assert occupancy(ARCHES["sm_80"], 256, 64, 0) == (4, "registers")
    assert occupancy(ARCHES["sm_89"], 128, 32, 48 << 10) == (2, "shared memory")
    assert occupancy(ARCHES["sm_90a"], 32, 16, 0)[0] == 32


def test_predictions_have_their_bound() -> None:
    device = TARGETS["h200"]
    assert predicted(device, 1 << 30, 1 << 20, 10000, 256, 4)[1] == "memory"
    assert predicted(device, 1 << 20, 1 << 40, 10000, 256, 4)[1] == "arithmetic"
    assert predicted(device, 1 << 30, 1 << 40, 0, 256, 4) == (0.0, "nothing to do")
    full = predicted(device, 1 << 30, 1 << 20, 10000, 256, 4, read=1 << 29, ahead=64)
    few = predicted(device, 1 << 30, 1 << 20, 10000, 256, 4, read=1 << 29, ahead=4)
    assert full[1] == "memory" and few[1] == "loads" and few[0] > 2 * full[0]
    busy = predicted(device, 1 << 28, 1 << 20, 10000, 256, 4, ahead=64, instructions=4000)
    assert busy[1] == "instructions"
    time, bound = predicted(device, 1 << 10, 1 << 10, 1, 256, 4)
    assert bound == "start" and device.start < time < 2 * device.start
    near = predicted(device, 1 << 24, 1 << 20, 10000, 256, 4, "f32", 1 << 24)
    assert near[0] < predicted(device, 1 << 24, 1 << 20, 10000, 256, 4)[0]
    far = predicted(device, 1 << 27, 1 << 20, 10000, 256, 4, "f32", 1 << 27)
    assert far == predicted(device, 1 << 27, 1 << 20, 10000, 256, 4)  # more than is cached
    tensor = [predicted(device, 1, 1 << 40, 10000, 256, 4, a)[0] for a in ("f32", "tf32", "half")]
    assert tensor[0] > tensor[1] > tensor[2]


def test_predictions_follow_sizes_and_devices(tmp_path: Path) -> None:
    """What a plan says of its launches is enough for any sizes; no kernel works at both ends."""
    (pipeline,) = compiled(tmp_path / "p.pipe", TEXT).pipelines
    sizes = largest(pipeline.dims)
    assert sizes == {"B": 64, "T": 512}
    for gpu in pipeline.gpu:
        names = [t.name for t in TARGETS.values() if t.arch.name == gpu.arch]
        for launch in gpu.launches:
            large, small = (predict(gpu, launch, s) for s in (sizes, {"B": 1, "T": 1}))
            assert large is not None and small is not None
            assert list(large.devices) == list(small.devices) == names
            assert large.bytes > small.bytes and large.flops >= small.flops
            for name, (time, bound) in large.devices.items():
                assert (time == 0) == (bound == "nothing to do")
                assert not time or time > small.devices[name][0]
        said = [predict(gpu, launch, sizes) for launch in gpu.launches]
        run = sum(p.flops for p in said if p is not None and p.devices[names[0]][0])
        product = 2 * 64 * 512 * 1536 * 384
        assert product < run < 1.1 * product  # by one of the kernels that share the sizes
