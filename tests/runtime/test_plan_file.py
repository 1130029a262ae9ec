"""Plan files: the same bytes for the same plan, and nothing but a whole plan is read."""

from __future__ import annotations

import contextlib
import copy
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
from stagefuse.compiler.errors import PlanError
from stagefuse.compiler.plan import ArgumentPlan, DimPlan, Plan
from stagefuse.dsl.dtypes import DTYPES

from . import handmade


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.fused"
    plan_file.write(handmade.plan(), path)
    return path


def test_reading_gives_what_was_written(file: Path) -> None:
    written, found = handmade.plan(), plan_file.read(file, verify=True)
    assert found.pipelines == written.pipelines
    assert found.objects == written.objects
    assert (found.source, found.source_name) == (written.source, written.source_name)
    assert found.report == written.report
    assert found.arrays.keys() == written.arrays.keys()
    for name, array in found.arrays.items():
        np.testing.assert_array_equal(array, written.arrays[name])
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0


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
    monkeypatch.setattr(plan_file, "FORMAT_VERSION", 2)
    plan_file.write(handmade.plan(), file)
    monkeypatch.undo()
    with pytest.raises(PlanError, match="format version 2.*reads 1: use a newer stagefuse"):
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


def rewritten(file: Path, document: Any) -> None:
    """The plan with another plan.json, all hashes right."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["plan.json"] = json.dumps(document).encode()
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


def test_a_foreign_plan_json_is_a_plan_error_at_worst(file: Path) -> None:
    original = handmade_document(file)
    values = [None, -1, 10**30, 1.5, True, "", "B", "B +", "Q", [], {}, [1], "(" * 500, "9" * 5000]
    random_ = random.Random(2)
    for _ in range(400):
        document = copy.deepcopy(original)
        container, key = random_.choice(places(document))
        if isinstance(container, dict) and random_.random() < 0.2:
            del container[key]
        else:
            container[key] = random_.choice(values)
        rewritten(file, document)
        with contextlib.suppress(PlanError):
            plan_file.read(file)
        plan_file.write(handmade.plan(), file)


def handmade_document(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("plan.json"))
