"""Weights files: the tensors' names, dtypes and shapes, and arrays mapped from the file on demand.

Reads `.safetensors` (with a bounded header parser of our own: the file may be hostile), NumPy's
`.npz` and `.gguf`, and `.safetensors.index.json`, which says in which of several files beside it
each tensor is. Only headers are read when a file is opened; tensor bytes are mapped when asked for.
"""

from __future__ import annotations

import ast
import json
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import IO, Any, TypeVar

from . import dtypes
from .dtypes import DType
from .frozen import frozen
from .gguf import read_gguf
from .numpy_later import np
from .tensor_header import TensorHeader, checked_size

MAX_HEADER_BYTES = 100_000_000
"""The largest header that is accepted. Source: the safetensors format, `MAX_HEADER_SIZE`."""
INDEX = ".safetensors.index.json"
"""How the name of a file ends that says where the tensors of a large model are."""
_NPY_HEADER_BYTES = 1 << 16

_SAFETENSORS = {d.stored: d for d in dtypes.DTYPES.values()}
_NUMPY = {
    f"{'f' if d.is_float else 'i' if d.kind == 'int' else d.kind[0]}{d.itemsize}": d
    for d in dtypes.DTYPES.values() if not d.is_extended
}  # fmt: skip
"""By NumPy's code for a kind and a size."""



Found = TypeVar("Found")


class WeightsError(Exception):
    """A weights file that cannot be read: missing, damaged, or of a kind that is not known."""


@frozen
class WeightsFile:
    """An opened weights file: headers by key in the file's order; arrays are mapped on demand."""

    path: Path
    tensors: dict[str, TensorHeader]
    parts: dict[str, WeightsFile] = field(default_factory=dict)
    """The file of each tensor, where it is another one."""

    def headers(self) -> dict[str, tuple[DType, tuple[int, ...]]]:
        """The dtype and shape of every tensor whose dtype the language knows."""
        known = self.tensors.values()
        return {t.key: (t.dtype, t.shape) for t in known if t.dtype is not None}

    def all_headers(self) -> dict[str, tuple[DType | str, tuple[int, ...]]]:
        """The same of every tensor: dtypes that the language lacks as the file names them."""
        return {t.key: (t.dtype or t.stored_dtype, t.shape) for t in self.tensors.values()}

    def array(self, key: str) -> np.ndarray[Any, Any]:
        """The tensor `key` as a read-only array; mapped from the file, or read where compressed."""
        if key in self.parts:
            return self.parts[key].array(key)
        header = self.tensors.get(key)
        if header is None:
            raise WeightsError(f"{self.path} has no tensor `{key}`")
        if header.dtype is None:
            raise WeightsError(f"`{key}` has dtype {header.stored_dtype}, which is not supported")
        if header.offset is None:
            return self._read_compressed(header)
        dtype = header.dtype.numpy
        if header.big_endian:
            dtype = dtype.newbyteorder(">")
        if header.size_bytes == 0:
            return np.zeros(header.shape, header.dtype.numpy)
        if header.block is not None:
            return self._native(self._blocks(header), header)
        raw = np.memmap(self.path, np.uint8, "r", header.offset, (header.size_bytes,))
        order: Any = "F" if header.fortran else "C"
        array = np.asarray(raw).view(dtype).reshape(header.shape, order=order)
        return self._native(array, header)

    def _blocks(self, header: TensorHeader) -> np.ndarray[Any, Any]:
        """A part of each block, gathered."""
        assert header.offset is not None and header.dtype is not None and header.block is not None
        stride, own = header.block
        count = header.size_bytes // own
        span = (count - 1) * stride + own
        raw = np.memmap(self.path, np.uint8, "r", header.offset, (span,))
        rows = np.lib.stride_tricks.as_strided(raw, (count, own), (stride, 1))
        return np.ascontiguousarray(rows).view(header.dtype.numpy).reshape(header.shape)

    def _read_compressed(self, header: TensorHeader) -> np.ndarray[Any, Any]:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return self._native(np.asarray(archive[header.key]), header)
        except Exception as error:  # NumPy and zipfile raise what they like for damaged files
            raise WeightsError(f"{self.path}: `{header.key}` is damaged: {error}") from error

    @staticmethod
    def _native(array: np.ndarray[Any, Any], header: TensorHeader) -> np.ndarray[Any, Any]:
        if header.big_endian:
            assert header.dtype is not None
            array = array.astype(header.dtype.numpy)
        array.flags.writeable = False
        return array


def open_weights(path: str | Path) -> WeightsFile:
    """The weights file at `path`, by its extension. Raises: WeightsError, in words for the user."""
    path = Path(path)
    if path.name.lower().endswith(INDEX):
        return _open_parts(path)
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".gguf": read_gguf}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise WeightsError(f"`{path.name}` is none of .safetensors, .npz, .gguf and {INDEX}")
    return WeightsFile(path, {tensor.key: tensor for tensor in _read(path, reader)})


def _open_parts(path: Path) -> WeightsFile:
    """The tensors of the files that an index names."""
    places = _read(path, _read_index)
    files = {name: open_weights(path.with_name(name)) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in files[name].tensors:
            raise WeightsError(f"`{path}` looks for `{key}` in `{name}`, which does not have it")
    tensors = {key: files[name].tensors[key] for key, name in places.items()}
    return WeightsFile(path, tensors, {key: files[name] for key, name in places.items()})


def _read(path: Path, reader: Callable[[IO[bytes], int], Found]) -> Found:
    """What a reader finds in a file. Raises WeightsError for whatever is wrong with it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise WeightsError(f"`{path}` is no regular file")
        with path.open("rb") as file:
            return reader(file, status.st_size)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file `{path}`") from error
    except OSError as error:
        raise WeightsError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except WeightsError:
        raise
    except Exception as error:  # zipfile and what decompresses raise what they like
        raise WeightsError(f"`{path}` is damaged: {error}") from error


def _read_index(file: IO[bytes], size_bytes: int) -> dict[str, str]:
    """The file of each tensor by its name: one beside the index."""
    if size_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"an index of {size_bytes} bytes")
    text = file.read(MAX_HEADER_BYTES).decode("utf-8")
    found = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError("it has no `weight_map` of names of files")
    for name in places.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"it names `{name}`, which is no .safetensors file beside it")
    return places


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("the header names a tensor twice")
    return entries


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"the header holds {text}")


def _read_safetensors(file: IO[bytes], size_bytes: int) -> list[TensorHeader]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError("it is shorter than a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES or length > size_bytes - 8:
        raise ValueError(f"its header claims {length} bytes")
    text = file.read(length).decode("utf-8")
    header = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    data_start = 8 + length
    tensors = [
        _safetensors_entry(key, entry, data_start, size_bytes)
        for key, entry in header.items()
        if key != "__metadata__"
    ]
    covered = 0
    for tensor in sorted(tensors, key=lambda t: (t.offset or 0, t.size_bytes)):
        if tensor.offset != data_start + covered:
            raise ValueError(f"`{tensor.key}` overlaps another tensor or leaves a hole")
        covered += tensor.size_bytes
    if data_start + covered != size_bytes:
        raise ValueError("its data is longer or shorter than the tensors of the header")
    return tensors


def _safetensors_entry(key: str, entry: Any, data_start: int, size_bytes: int) -> TensorHeader:
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of `{key}` is not an object")
    stored = entry.get("dtype")
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if not isinstance(stored, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"the entry of `{key}` lacks a dtype, a shape or offsets")
    if len(offsets) != 2 or any(type(o) is not int for o in offsets):
        raise ValueError(f"the offsets of `{key}` are invalid")
    begin, end = offsets
    if not 0 <= begin <= end <= size_bytes - data_start:
        raise ValueError(f"the offsets of `{key}` leave the file")
    dtype = _SAFETENSORS.get(stored)
    size = checked_size(key, tuple(shape), dtype.itemsize if dtype else 1)
    if dtype is not None and size != end - begin:
        raise ValueError(f"`{key}` takes {size} bytes and its offsets span {end - begin}")
    return TensorHeader(key, dtype, stored, tuple(shape), data_start + begin, end - begin)


def _read_npz(file: IO[bytes], size_bytes: int) -> list[TensorHeader]:
    tensors = []
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                tensors.append(_npz_entry(archive, info, file, size_bytes))
    return tensors


def _npz_entry(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes], size_bytes: int
) -> TensorHeader:
    key = info.filename.removesuffix(".npy")
    with archive.open(info) as member:
        start, description = _npy_header(key, member)
    stored, fortran, shape = description
    dtype = _NUMPY.get(stored[1:])
    size = checked_size(key, shape, dtype.itemsize if dtype else 1)
    if dtype is not None and start + size != info.file_size:
        raise ValueError(f"`{key}` takes {size} bytes and {info.file_size - start} are stored")
    offset: int | None = None
    if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        offset = info.header_offset + 30 + name_length + extra_length + start
        if dtype is not None and offset + size > size_bytes:
            raise ValueError(f"`{key}` leaves the file")
    big_endian = stored.startswith(">")
    return TensorHeader(key, dtype, stored, shape, offset, size, fortran, big_endian)


def _npy_header(key: str, member: IO[bytes]) -> tuple[int, tuple[str, bool, tuple[int, ...]]]:
    """Where the data begins and (dtype, Fortran order, shape). Source: NumPy's `npy` format."""
    magic = member.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError(f"`{key}` is not an array")
    width, code = (2, "<H") if magic[6] == 1 else (4, "<I")
    (length,) = struct.unpack(code, member.read(width))
    if length > _NPY_HEADER_BYTES:
        raise ValueError(f"the header of `{key}` claims {length} bytes")
    text = member.read(length).decode("utf-8" if magic[6] == 3 else "latin-1")
    header = ast.literal_eval(text.strip())
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError(f"the header of `{key}` is invalid")
    stored, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    if not isinstance(stored, str):
        stored = "struct"
    if not isinstance(fortran, bool) or not isinstance(shape, tuple):
        raise ValueError(f"the header of `{key}` is invalid")
    return 8 + width + length, (stored, fortran, shape)
