"""Safetensors files that are damaged, hostile or in several parts."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import stagefuse as sf
from stagefuse.dsl.weights import WeightsError, open_weights


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def written(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def damaged(good: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """A file 300 times, with another byte somewhere."""
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] = rng.integers(256)
        yield bytes(bad)


def test_tensors_may_begin_at_any_byte(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.standard_normal(3).astype(np.float32)
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [3], 1, 13)}
    file = open_weights(written(tmp_path / "w.safetensors", header, b"\7" + array.tobytes()))
    np.testing.assert_array_equal(file.array("b"), array)


@pytest.mark.parametrize(
    "header, words",
    [({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, "overlaps"),
     ({"a": entry("F32", [2], 4, 12)}, "leaves a hole"),
     ({"a": entry("F32", [2], 0, 8)}, "longer or shorter"),
     ({"a": entry("F32", [2], 0, 12)}, "takes 8 bytes"),
     ({"a": entry("F32", [4], 0, 20)}, "leave the file"),
     ({"a": entry("F32", [-4], 0, 12)}, "invalid shape"),
     ({"a": entry("F32", [3.0], 0, 12)}, "invalid shape"),
     ({"a": entry("F32", [1 << 61, 1 << 61], 0, 12)}, "impossible size"),
     ({"a": {"dtype": "F32", "shape": [3]}}, "lacks"), ({"a": None}, "not an object"),
     (b'{"a":1,"a":1}', "twice"), (b"[" * 100000, "is damaged"), (b"[]", "not an object"),
     (b'{"a":NaN}', "NaN")],
)  # fmt: skip
def test_a_header_that_lies_is_refused(header: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=words):
        open_weights(written(tmp_path / "w.safetensors", header, bytes(12)))


def test_any_byte_may_be_wrong(tmp_path: Path, rng: np.random.Generator) -> None:
    """It is refused, or read without reading elsewhere."""
    header = {"a.b": entry("F32", [2, 2], 0, 16), "c": entry("I64", [1], 16, 24)}
    path = written(tmp_path / "w.safetensors", header, bytes(24))
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(WeightsError):
            open_weights(path)
    for bad in damaged(good, rng):
        path.write_bytes(bad)
        try:
            file = open_weights(path)
        except WeightsError:
            continue
        assert sum(file.array(key).nbytes for key in file.headers()) <= 24


def parts(folder: Path, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {f"layers.{k}.weight": rng.standard_normal((2, 2)).astype(np.float32)
              for k in range(3)}  # fmt: skip
    places = {}
    for number, own in enumerate((list(arrays)[:1], list(arrays)[1:]), 1):
        name = f"m-{number}-of-2.safetensors"
        save_file({key: arrays[key] for key in own}, folder / name)
        places |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 48}, "weight_map": places}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    return arrays


def test_a_model_in_several_files_is_one_scope(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = parts(tmp_path, rng)
    path = tmp_path / "p.pipe"
    path.write_text(
        'weights w = "m.safetensors.index.json"\n\npipeline p(x: f32[2]) -> f32[2]:\n'
        "    for layer in w.layers:\n        x = layer.weight @ x\n    x\n"
    )
    x = rng.integers(-4, 5, 2).astype(np.float32)
    exact, size = x.astype(float), np.abs(x).astype(float)
    for array in arrays.values():
        exact, size = array.astype(float) @ exact, np.abs(array).astype(float) @ size
    # each of three products rounds two terms and their sum
    assert np.all(np.abs(sf.compile(path)(x=x) - exact) <= 3 * 2 * 2.0**-24 * size * 1.01)


@pytest.mark.parametrize(
    "index, words",
    [({"weight_map": {"a": "m-1-of-2.safetensors"}}, "looks for `a`"),
     ({"weight_map": {"a": "gone.safetensors"}}, "there is no file"),
     ({"weight_map": {"a": "../m-1-of-2.safetensors"}}, "beside it"),
     ({"weight_map": {"a": "/etc/passwd"}}, "beside it"), ({"weight_map": {"a": ""}}, "beside it"),
     ({"weight_map": {"a": "m.safetensors.index.json"}}, "beside it"),
     ({"weight_map": {"a": 1}}, "weight_map"), ({"weight_map": []}, "weight_map"),
     ({}, "weight_map"), ([], "weight_map")],
)  # fmt: skip
def test_an_index_that_lies_is_refused(
    index: Any, words: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    parts(tmp_path, rng)
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=words):
        open_weights(path)


@pytest.mark.parametrize("items", ["n", "n, :", "n + 1 - 1", "at", "at, :", "w.at", "w.n", "2"])
def test_items_of_weights_are_updated(items: str, rng: np.random.Generator) -> None:
    """A name of weights has a value, whether it is updated or says at which positions."""
    table = rng.standard_normal((4, 3)).astype(np.float32)
    text = (
        'weights w = "w.npz"\n\npipeline p(n: i64, v: f32[3]) -> (f32[4, 3], f32[4, 3]):\n'
        f"    at = w.at\n    y = w.table\n    y[{items}] = v\n    y, w.table\n"
    )
    weights = {"table": table, "at": np.array([2]), "n": np.array(2)}
    found, kept = sf.compile(text, weights={"w": weights})(n=np.int64(2), v=np.ones(3, np.float32))
    wanted = table.copy()
    wanted[2] = 1.0
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(kept, table)


def test_any_byte_of_a_compressed_file_may_be_wrong(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "w.npz"
    np.savez_compressed(path, a=rng.standard_normal(50), b=np.arange(99.0))
    good = path.read_bytes()
    for bad in damaged(good, rng):
        path.write_bytes(bad)
        try:
            file = open_weights(path)
            assert sum(file.array(key).nbytes for key in file.headers()) <= 8 * 149
        except WeightsError:
            pass
