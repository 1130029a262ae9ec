"""Plan files: the same bytes for the same plan, and nothing but a whole plan is read."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from stagefuse.compiler import plan_file
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.errors import PlanError
from stagefuse.compiler.plan import (
    FORMAT_VERSION,
    AliasPlan,
    ArgumentPlan,
    BufferPlan,
    Cubin,
    DimPlan,
    GpuPlan,
    PiecesPlan,
    Plan,
)
from stagefuse.dsl.dtypes import DTYPES

from . import handmade, handmade_gpu


@pytest.fixture(params=[handmade.plan, handmade_gpu.plan], ids=["cpu", "gpu"])
def written(request: pytest.FixtureRequest) -> Plan:
    plan = request.param()
    assert isinstance(plan, Plan)
    return plan


@pytest.fixture()
def file(written: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "model.fused"
    plan_file.write(written, path)
    return path


def test_reading_gives_what_was_written(file: Path, written: Plan) -> None:
    found = plan_file.read(file, verify=True)
    assert (found.ptx, found.cubins) == (written.ptx, written.cubins)
    assert found.pipelines == written.pipelines
    assert found.objects == written.objects
    assert (found.source, found.source_name) == (written.source, written.source_name)
    assert found.report == written.report
    assert found.arrays.keys() == written.arrays.keys()
    for name, array in found.arrays.items():
        np.testing.assert_array_equal(array, written.arrays[name])
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0


def test_reading_without_code_for_gpus(file: Path, written: Plan) -> None:
    found = plan_file.read(file, gpu=False)
    assert found.pipelines == tuple(replace(p, gpu=()) for p in written.pipelines)
    assert (found.ptx, found.cubins) == ({}, {}) and found.objects == written.objects


def test_same_plan_same_bytes(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.fused"
    plan_file.write(plan_file.read(file), again)
    assert again.read_bytes() == file.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_members_are_stored_and_aligned(file: Path) -> None:
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        assert archive.testzip() is None
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            assert plan_file._data_offset(raw, entry, file.stat().st_size) % 64 == 0


def test_members_beyond_4_gigabytes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 200)
    plan_file.write(handmade.plan(), file)
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        for entry in archive.infolist():
            assert plan_file._data_offset(raw, entry, file.stat().st_size) % 64 == 0
    assert plan_file.read(file, verify=True).pipelines == handmade.plan().pipelines


def test_every_dtype_and_empty_and_scalar_arrays(tmp_path: Path) -> None:
    arrays = {
        name: np.arange(6).reshape(2, 3).astype(dtype.numpy) for name, dtype in DTYPES.items()
    }
    arrays |= {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(7, np.int64)}
    arrays["fortran"] = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    path = tmp_path / "model.fused"
    plan_file.write(handmade.plan(handmade.lookup(), arrays=arrays), path)
    found = plan_file.read(path).arrays
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_weights_are_a_safetensors_file(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extract("weights.safetensors", tmp_path)
    with safe_open(tmp_path / "weights.safetensors", "np") as weights:
        np.testing.assert_array_equal(weights.get_tensor("w"), [1, 2, 3])


def test_every_truncation_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for length in [0, 1, 21, 22, *range(100, len(data), 97), len(data) - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(PlanError):
            plan_file.read(file)


def test_every_flipped_byte_is_refused_or_harmless(file: Path) -> None:
    data, whole = file.read_bytes(), plan_file.read(file)
    for position in random.Random(1).sample(range(len(data)), 700):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            found = plan_file.read(file, verify=True)
        except PlanError:
            continue
        assert found.pipelines == whole.pipelines and found.objects == whole.objects
        assert found.ptx == whole.ptx and found.cubins == whole.cubins
        np.testing.assert_array_equal(found.arrays["w"], whole.arrays["w"])


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x05\x06" + bytes(18), bytes(5000)])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(PlanError, match="other"):
        plan_file.read(path)


def test_a_foreign_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(PlanError, match="no member plan.json"):
        plan_file.read(path)


def test_a_compressed_member_is_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "packed.fused"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(PlanError, match="compressed"):
        plan_file.read(path)


def test_a_newer_version_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "FORMAT_VERSION", FORMAT_VERSION + 1)
    plan_file.write(handmade.plan(), file)
    monkeypatch.undo()
    said = f"format version {FORMAT_VERSION + 1}.*reads {FORMAT_VERSION}: use a newer stagefuse"
    with pytest.raises(PlanError, match=said):
        plan_file.read(file)


def test_an_older_version_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "FORMAT_VERSION", 1)
    plan_file.write(handmade.plan(), file)
    monkeypatch.undo()
    said = f"format version 1.*reads {FORMAT_VERSION}: compile it again"
    with pytest.raises(PlanError, match=said):
        plan_file.read(file)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    bad = handmade.plan(arrays={"w": np.array([1 + 2j])})
    with pytest.raises(PlanError):
        plan_file.write(bad, tmp_path / "model.fused")
    assert list(tmp_path.iterdir()) == []


def changed(**changes: Any) -> Plan:
    return handmade.plan(replace(handmade.affine(), **changes))


def step(**changes: Any) -> dict[str, Any]:
    first, *rest = handmade.affine().steps
    return {"steps": (replace(first, **changes), *rest)}


def buffer(number: int, **changes: Any) -> dict[str, Any]:
    buffers = list(handmade.affine().buffers)
    buffers[number] = replace(buffers[number], **changes)
    return {"buffers": tuple(buffers)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "not a name"),
        (step(buffers=(0, 1, 9)), "buffer 9"),
        (step(buffers=(0, 1, -1)), "buffer -1"),
        (step(dims=("Q",)), "unknown dim 'Q'"),
        (step(count="3*B*"), "not a dimension expression"),
        (step(scratch_bytes="T)"), "not a dimension expression"),
        (step(symbol="a b"), "not a symbol"),
        (step(pieces=(PiecesPlan(3, "B"),)), "pieces of its buffer 3"),
        (step(pieces=(PiecesPlan(1, "B"),)), "no panels of f32"),
        (step(pieces=(PiecesPlan(0, "3*"),)), "not a dimension expression"),
        (buffer(0, dtype="f31"), "unknown dtype"),
        (buffer(0, role="output"), "unknown role"),
        (buffer(0, shape=("B", "T")), "differ in type"),
        (buffer(1, array="v"), "which the plan lacks"),
        (buffer(1, array=None), "belongs to a weight"),
        (buffer(1, shape=("4",)), "its array is"),
        (buffer(1, shape=("T",)), "its array is"),
        (buffer(2, slot=1), "slot 1 of 1"),
        (buffer(2, slot=None), "a slot belongs"),
        (buffer(2, role="result", slot=None), "one to one"),
        ({"dims": (DimPlan("B"),)}, "unknown dim"),
        ({"dims": (*handmade.affine().dims, DimPlan("Z"))}, "no input's shape determines"),
        ({"dims": (*handmade.affine().dims, DimPlan("B"))}, "twice"),
        ({"slots": ("x.y + ",)}, "not a dimension expression"),
        ({"inputs": (ArgumentPlan("x", "f32", ("B", "3*T"), 7),)}, "does not exist"),
        ({"inputs": (ArgumentPlan("x", "f32", ("B", "3*T"), 3),)}, "role 'result'"),
    ],
)
def test_rules_of_plans(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        plan_file.write(changed(**changes), tmp_path / "model.fused")


GPU_SHAPE = handmade.F32_BT


def gpu(**changes: Any) -> dict[str, Any]:
    return {"gpu": (replace(handmade_gpu.affine("sm_90a"), **changes),)}


def launch(**changes: Any) -> dict[str, Any]:
    first, *rest = handmade_gpu.affine("sm_90a").launches
    return gpu(launches=(replace(first, **changes), *rest))


def gpu_buffer(number: int, **changes: Any) -> dict[str, Any]:
    buffers = list(handmade_gpu.affine("sm_90a").buffers)
    buffers[number] = replace(buffers[number], **changes)
    return gpu(buffers=tuple(buffers))


SM_80 = handmade_gpu.affine("sm_80")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (launch(kernel="ad"), "no such entry"),
        (launch(buffers=(0, 1, 9)), "buffer 9"),
        (launch(buffers=(0, 1)), "gives 4 parameters of 8 bytes, not u64, u64, u64, s64, u64"),
        (launch(dims=("B", "T")), "gives 6 parameters"),
        (launch(buffers=(0, 1, -1)), "buffer -1"),
        (launch(writes=(4,)), "can't write buffer 4"),
        (launch(writes=(0,)), "can't write buffer 0"),
        (launch(dims=("Q",)), "unknown dim 'Q'"),
        (launch(grid=("B", "1", "T)")), "not a dimension expression"),
        (launch(shared_bytes="4*"), "not a dimension expression"),
        (launch(block=(1024, 2, 1)), "no block has"),
        (launch(block=(0, 1, 1)), "no block has"),
        (launch(block=(1, 1, 128)), "no block has"),
        (launch(cluster=(4, 8, 1)), "no cluster of"),
        (launch(cluster=(0, 1, 1)), "no cluster of"),
        (gpu(aliases=(AliasPlan(2, 9, "1"),)), "alias 0 uses a buffer that does not exist"),
        (gpu(aliases=(AliasPlan(3, 2, "1"),)), "t can't stand for y"),
        (gpu(aliases=(AliasPlan(2, 0, "Q"),)), "unknown dim 'Q'"),
        (gpu(aliases=(AliasPlan(2, 2, "1"),)), "t has a place already"),
        (gpu(aliases=(AliasPlan(2, 0, "1"),) * 2), "t has a place already"),
        ({"gpu": (replace(SM_80, launches=(
            replace(SM_80.launches[0], cluster=(2, 1, 1)),)),)}, "sm_80 has no cluster"),
        ({"gpu": (SM_80, SM_80)}, "sm_80.*twice"),
        (gpu(arch="sm_75"), "sm_75"),
        (gpu(slots=("12*",)), "not a dimension expression"),
        (gpu_buffer(0, shape=("B", "T")), "inputs and buffers"),
        (gpu_buffer(3, dtype="f16"), "results and buffers"),
        (gpu_buffer(0, role="output"), "unknown role"),
        (gpu_buffer(1, array="v"), "which the plan lacks"),
        (gpu_buffer(2, slot=1), "slot 1 of 1"),
        (gpu_buffer(2, slot=None), "a slot belongs"),
        (gpu(buffers=(*handmade_gpu.affine("sm_90a").buffers,
                      BufferPlan("x2", "f32", GPU_SHAPE, "input"))), "inputs and buffers"),
    ],
)  # fmt: skip
def test_rules_of_gpu_plans(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    wrong = handmade_gpu.plan(replace(handmade.affine(), **changes))
    with pytest.raises(PlanError, match=message):
        plan_file.write(wrong, tmp_path / "model.fused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ptx": {"sm_75": handmade_gpu.ptx("sm_75")}, "cubins": {}}, "unknown arch 'sm_75'"),
        ({"ptx": {"sm_90a": handmade_gpu.ptx("sm_80")}, "cubins": {}}, "names the target sm_80"),
        ({"ptx": {"sm_90a": "no PTX"}, "cubins": {}}, "names no target"),
        ({"ptx": {}, "cubins": {}}, "holds no PTX"),
        ({"ptx": {"sm_80": handmade_gpu.ptx("sm_80")}}, "without the PTX"),
        ({"cubins": {"sm_90a": (Cubin(("add", "scale", "take"), b"ELF"),)}}, "not an ELF file"),
        ({"cubins": {"sm_90a": handmade_gpu.cubins("sm_90a") * 2}}, "'add' is there twice"),
        ({"cubins": {"sm_90a": ()}}, "no cubin for sm_90a holds the kernel add"),
    ],
)
def test_rules_of_gpu_code(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        plan_file.write(handmade_gpu.plan(**changes), tmp_path / "model.fused")


def test_misfits_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.fused"
    for name, keys, value, message in (
        ("pipelines.json", (0, "steps", 1, "count"), 3,
         r"pipelines\[0\].steps\[1\].count: expected str, found int"),
        ("pipelines.json", (1, "dims", 0, "nome"), "N",
         r"pipelines\[1\].dims\[0\]: unknown field 'nome'"),
        ("gpu.json", ("affine", 2, "launches", 0, "block"), [1, 2],
         r"affine\[2\].launches\[0\].block: expected 3 items, found 2"),
    ):  # fmt: skip
        plan_file.write(handmade_gpu.plan(), file)
        document = handmade_document(file, name)
        at = document
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        rewritten(file, document, name)
        with pytest.raises(PlanError, match=message):
            plan_file.read(file)


def test_gpu_plans_belong_into_their_own_member(file: Path) -> None:
    document = handmade_document(file, "pipelines.json")
    document[0]["gpu"] = json.loads(plan_file.encode((GpuPlan("sm_80", (), ()),)))
    rewritten(file, document, "pipelines.json")
    with pytest.raises(PlanError, match="belongs into gpu.json"):
        plan_file.read(file)


def test_what_fails_while_a_plan_is_made_keeps_its_name(tmp_path: Path) -> None:
    plan, path = handmade.plan(), tmp_path / "model.fused"

    def make() -> Plan:
        assert len(list(tmp_path.glob(".*"))) == 1
        raise OSError(errno.EIO, "Input/output error", "elsewhere")

    with pytest.raises(OSError, match="elsewhere"):
        plan_file.write_made(path, plan.arrays, make)
    assert list(tmp_path.iterdir()) == []
    plan_file.write_made(path, plan.arrays, lambda: plan)
    written = path.read_bytes()
    plan_file.write(plan, path)
    assert path.read_bytes() == written


def rewritten(file: Path, document: Any, name: str = "plan.json") -> None:
    """The plan with another member of JSON, all hashes of members right."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[name] = json.dumps(document).encode()
    if name != "plan.json":
        whole = json.loads(members["plan.json"])
        digest = hashlib.sha256(members[name]).hexdigest()
        whole["members"][name] = {"size": len(members[name]), "sha256": digest}
        members["plan.json"] = json.dumps(whole).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        digest = hashlib.sha256(members["plan.json"]).hexdigest()
        archive.comment = (plan_file._COMMENT + digest).encode()


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


@pytest.mark.parametrize("name", ["plan.json", "pipelines.json", "gpu.json"])
def test_a_foreign_document_is_a_plan_error_at_worst(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.fused"
    plan_file.write(handmade_gpu.plan(), file)
    original = handmade_document(file, name)
    values = [None, -1, 10**30, 1.5, True, "", "B", "B +", "Q", [], {}, [1], "(" * 500, "9" * 5000]
    random_ = random.Random(2)
    for _ in range(400):
        document = copy.deepcopy(original)
        container, key = random_.choice(places(document))
        if isinstance(container, dict) and random_.random() < 0.2:
            del container[key]
        else:
            container[key] = random_.choice(values)
        rewritten(file, document, name)
        with contextlib.suppress(PlanError):
            plan_file.read(file)
        plan_file.write(handmade_gpu.plan(), file)


def handmade_document(file: Path, name: str = "plan.json") -> Any:
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read(name))


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("pipelines.json", (0, "steps", 0, "buffers"), [0, 1, 1]),
        ("pipelines.json", (0, "steps", 0, "count"), "4*B*T"),
        ("pipelines.json", (0, "steps", 0, "scratch_bytes"), "0"),
        ("pipelines.json", (0, "dims", 0, "high"), None),
        ("gpu.json", ("affine", 0, "launches", 0, "grid"), ["9", "1", "1"]),
    ],
)
def test_code_runs_no_other_steps(
    name: str, keys: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "model.fused"
    plan_file.write(handmade_gpu.plan(), file)
    document = at = handmade_document(file, name)
    for key in keys[:-1]:
        at = at[key]
    assert at[keys[-1]] != value
    at[keys[-1]] = value
    rewritten(file, document, name)
    with pytest.raises(PlanError, match="the code for .* was made for other steps"):
        plan_file.read(file)


def test_positions_that_are_not_those_compiled_for_are_refused(tmp_path: Path) -> None:
    """Kernels read at them without a look: all are known to be within bounds."""
    at = np.random.default_rng().integers(0, 8, 1000)
    source, file = tmp_path / "p.pipe", tmp_path / "p.fused"
    np.savez(tmp_path / "w.npz", at=at)
    source.write_text(
        'weights w = "w.npz"\npipeline p(x: f32[16]) -> f32[1000]:\n    x[w.at * 2]\n'
    )
    plan_file.write(compile_file(source, levels=("v3",)), file)
    content = bytearray(file.read_bytes())
    content[content.index((at * 2).tobytes()) + 5] = 0x7F
    plan_file.read(file)
    file.write_bytes(content)
    with pytest.raises(PlanError, match="the array constant/.* is damaged"):
        plan_file.read(file)
