"""The file format of plans: a zip with stored, aligned members, read by mapping it.

    weights.safetensors  weights and constants; each tensor's data starts at a multiple of 64
    pipelines.json       the PipelinePlans, without those for GPUs
    cpu/<level>.o        machine code for an x86-64 level
    cpu/call.o           what calls that from Python
    gpu.json             the GpuPlans of each pipeline by name; with them
    kernels/<arch>.ptx   the GPU kernels of all pipelines, as text
    kernels/<arch>.<n>.cubin  some of them assembled, where it could be; plan.json tells which, and
                         which arches run it
    report.json          what the compiler decided
    plan.json            format version, source, hashes and sizes of the other members

The zip's comment holds the hash of plan.json, plan.json those of the rest. Behind machine code for
CPUs, and behind PTX, stands the hash of the steps and launches that it was made for: with others
it could write anywhere. The same plan gives
the same bytes: no times, a fixed order. A file is written under another name and then renamed, so
a reader sees the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from stagefuse.dsl.dtypes import DTYPES, from_numpy
from stagefuse.dsl.files import replace_file
from stagefuse.dsl.frozen import frozen

from .errors import PlanError
from .plan import (
    ABI_VERSION,
    CONSTANT,
    FORMAT_VERSION,
    GPU_ARCHES,
    LEVELS,
    Cubin,
    GpuPlan,
    PipelinePlan,
    Plan,
    constant_name,
)
from .plan_check import check
from .plan_json import decode, encode, fields_of

ALIGNMENT = 64
PLAN, WEIGHTS, REPORT = "plan.json", "weights.safetensors", "report.json"
PIPELINES, GPU = "pipelines.json", "gpu.json"
CALL = "cpu/call.o"
_COMMENT = "stagefuse plan, sha256 of plan.json: "
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_PADDING_FIELD = 0xD935  # the extra field that Android's zipalign uses
_MAX_HEADER = 100_000_000
_SMALL_BYTES = 1 << 16
_PIPELINES: Any = tuple[PipelinePlan, ...]
_GPU_PLANS: Any = tuple[GpuPlan, ...]


@frozen
class _CubinPart:
    """What a member with machine code holds, and which arches run it."""

    member: str
    arches: tuple[str, ...]
    kernels: tuple[str, ...]


_CUBIN_PARTS: Any = tuple[_CubinPart, ...]

_FROM_SAFETENSORS = {d.stored: d for d in DTYPES.values()}


def write(plan: Plan, path: str | Path) -> None:
    """Write a plan file. Raises PlanError for a plan that `plan_check` refuses, OSError."""
    check(plan)
    write_made(path, plan.arrays, lambda: plan)


def write_made(
    path: str | Path, arrays: Mapping[str, np.ndarray[Any, Any]], make: Callable[[], Plan]
) -> Plan:
    """Write the plan that `make` gives, and give it: its arrays are written before, while other
    processes are at work on the rest. Raises PlanError, OSError, and what `make` raises."""
    made: list[Plan] = []
    failed: list[OSError] = []

    def write_all(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            written = _Written(archive, file)
            written.add_arrays(arrays)
            try:
                made.append(make())
            except OSError as error:
                failed.append(error)
                raise
            check(made[0])
            written.add_rest(made[0])

    try:
        replace_file(Path(path), write_all)
    except OSError:  # it names the path, which has nothing to do with what `make` raised
        if failed:
            raise failed[0] from None
        raise
    return made[0]


class _Written:
    """What is in a plan file so far: sizes and hashes of its members by name."""

    def __init__(self, archive: zipfile.ZipFile, file: IO[bytes]) -> None:
        self.archive, self.file = archive, file
        self.manifest: dict[str, dict[str, Any]] = {}

    def add_arrays(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        header, tensors = _safetensors(arrays)
        self.add(WEIGHTS, [header, *tensors])
        self.manifest[WEIGHTS]["header_sha256"] = hashlib.sha256(header).hexdigest()

    def add_rest(self, plan: Plan) -> None:
        self.add(PIPELINES, [encode([_without_gpu(p) for p in plan.pipelines])])
        if any(p.gpu for p in plan.pipelines):
            self.add(GPU, [encode({p.name: p.gpu for p in plan.pipelines})])
        mark = _made_for(self.manifest)
        for level in LEVELS:
            if level in plan.objects:
                self.add(f"cpu/{level}.o", [plan.objects[level], mark])
        if plan.call:
            self.add(CALL, [plan.call])
        for arch in GPU_ARCHES:
            if arch in plan.ptx:
                self.add(f"kernels/{arch}.ptx", [plan.ptx[arch].encode(), mark])
        for cubin, name in _cubin_names(plan).items():
            self.add(name, [cubin.code])
        self.add(REPORT, [encode(plan.report)])
        document = encode(
            {
                "format": FORMAT_VERSION,
                "abi": ABI_VERSION,
                "source_name": plan.source_name,
                "source": plan.source,
                "cubins": _cubin_parts(plan),
                "members": self.manifest,
            }
        )
        _write_member(self.archive, self.file, PLAN, [document])
        self.archive.comment = (_COMMENT + hashlib.sha256(document).hexdigest()).encode()

    def add(self, name: str, chunks: Sequence[Any]) -> None:
        """A member made of pieces."""
        digest, size = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
        self.manifest[name] = {"size": size, "sha256": digest.hexdigest()}
        _write_member(self.archive, self.file, name, chunks)


def _made_for(manifest: Mapping[str, Mapping[str, Any]]) -> bytes:
    """What stands behind code: the hash of the steps and launches, as a comment in PTX."""
    hashes = [str(manifest[name].get("sha256")) for name in (PIPELINES, GPU) if name in manifest]
    return f"\n// made for {hashlib.sha256(''.join(hashes).encode()).hexdigest()}\n".encode()


def _cubin_names(plan: Plan) -> dict[Cubin, str]:
    """The member of each cubin; one that several arches run is kept once, under the first."""
    names: dict[Cubin, str] = {}
    for arch, cubins in plan.cubins.items():
        for number, cubin in enumerate(cubins):
            names.setdefault(cubin, f"kernels/{arch}.{number}.cubin")
    return names


def _cubin_parts(plan: Plan) -> list[_CubinPart]:
    return [
        _CubinPart(name, tuple(a for a in plan.cubins if cubin in plan.cubins[a]), cubin.kernels)
        for cubin, name in _cubin_names(plan).items()
    ]


def _without_gpu(pipeline: PipelinePlan) -> dict[str, Any]:
    record = fields_of(pipeline)
    del record["gpu"]
    return record


def _write_member(
    archive: zipfile.ZipFile, file: IO[bytes], name: str, chunks: Sequence[Any]
) -> None:
    size = sum(len(chunk) for chunk in chunks)
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o100644 << 16
    info.file_size = size
    large = size * 1.05 > zipfile.ZIP64_LIMIT
    start = file.tell() + _LOCAL_HEADER.size + len(name) + (20 if large else 0) + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as member:
        for chunk in chunks:
            member.write(chunk)


def _safetensors(arrays: Mapping[str, np.ndarray[Any, Any]]) -> tuple[bytes, list[Any]]:
    """Header and data of a safetensors file whose tensors are aligned by padding tensors."""
    header: dict[str, Any] = {}
    chunks: list[Any] = []
    offset = 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        dtype = from_numpy(array.dtype)
        if dtype is None:
            raise PlanError(f"the array {name!r} has the dtype {array.dtype}, which no plan holds")
        end = offset + array.nbytes
        header[name] = {
            "dtype": dtype.stored,
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        chunks.append(array.reshape(-1).view(np.uint8).data)
        padding = -end % ALIGNMENT
        if padding:
            header[f"__padding__.{len(header)}"] = {
                "dtype": "U8",
                "shape": [padding],
                "data_offsets": [end, end + padding],
            }
            chunks.append(bytes(padding))
        offset = end + padding
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, chunks


@frozen
class _Member:
    offset: int
    size: int


def read(path: str | Path, *, verify: bool = False, gpu: bool = True) -> Plan:
    """The plan of a file; its arrays are read-only views of the mapped file.

    Sizes, offsets, versions and the hashes of everything but the weights' data are checked
    always, that one with `verify`. Without `gpu` the plan is as if it had no code for GPUs, which
    takes a part of the time. Raises PlanError for any file that is not a whole plan of this
    version, OSError where the file can't be opened.
    """
    try:
        with open(path, "rb") as file:
            members, comment = _directory(file)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Reader(memoryview(mapped), members, comment).plan(verify, gpu)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _directory(file: IO[bytes]) -> tuple[dict[str, _Member], bytes]:
    """Where the members of the zip lie, none outside the file, none over another."""
    length = os.fstat(file.fileno()).st_size
    if length == 0:
        raise PlanError("the file is empty")
    try:
        with zipfile.ZipFile(file) as archive:
            entries, comment = archive.infolist(), archive.comment
    except (zipfile.BadZipFile, struct.error, ValueError, OverflowError, NotImplementedError):
        raise PlanError("not a plan, or a truncated one: no zip directory at its end") from None
    except OSError:
        raise PlanError("the zip directory is damaged") from None
    members: dict[str, _Member] = {}
    end_of_last = 0
    for entry in sorted(entries, key=lambda e: e.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
            raise PlanError(f"member {entry.filename} is compressed or encrypted; plans store")
        if entry.filename in members:
            raise PlanError(f"member {entry.filename} is there twice")
        offset = _data_offset(file, entry, length)
        if entry.header_offset < end_of_last or entry.file_size != entry.compress_size:
            raise PlanError(f"member {entry.filename} overlaps another")
        end_of_last = offset + entry.file_size
        if entry.file_size < 0 or end_of_last > length:
            raise PlanError(f"member {entry.filename} ends after the end of the file")
        members[entry.filename] = _Member(offset, entry.file_size)
    return members, comment


def _data_offset(file: IO[bytes], entry: zipfile.ZipInfo, length: int) -> int:
    if not 0 <= entry.header_offset <= length - _LOCAL_HEADER.size:
        raise PlanError(f"member {entry.filename} starts outside the file")
    file.seek(entry.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    name = file.read(header[9])
    if header[0] != b"PK\x03\x04" or name != entry.orig_filename.encode("utf-8", "replace"):
        raise PlanError(f"the header of member {entry.filename} is damaged")
    return int(entry.header_offset + _LOCAL_HEADER.size + header[9] + header[10])


class _Reader:
    def __init__(self, file: memoryview, members: dict[str, _Member], comment: bytes) -> None:
        self.file, self.members, self.comment = file, members, comment

    def plan(self, verify: bool, gpu: bool) -> Plan:
        document = self.document()
        manifest = document.get("members")
        if not isinstance(manifest, dict):
            raise PlanError("plan.json: `members` is missing")
        self.manifest(manifest, verify)
        mark = _made_for(manifest)
        objects = self.matching("cpu/", ".o")
        call = objects.pop("call", b"")
        ptx = self.matching("kernels/", ".ptx", gpu)
        plan = Plan(
            pipelines=self.pipelines(gpu),
            objects={k: bytes(v[: -len(mark)]) for k, v in objects.items()},
            arrays=self.arrays(),
            source=_text(document, "source"),
            source_name=_text(document, "source_name"),
            report=_load_json(self.member(REPORT), REPORT),
            ptx={k: _ptx(k, v[: -len(mark)]) for k, v in ptx.items()},
            cubins=self.cubins(document.get("cubins")) if gpu else {},
            call=bytes(call),
        )
        check(plan)
        for name, code in {**objects, **ptx}.items():
            if code[-len(mark) :] != mark:
                raise PlanError(f"the code for {name} was made for other steps than the plan has")
        for name, array in plan.arrays.items():
            if name.startswith(CONSTANT) and _may_index(array) and constant_name(array) != name:
                raise PlanError(f"the array {name} is damaged: its hash differs")
        return plan

    def pipelines(self, with_gpu: bool) -> tuple[PipelinePlan, ...]:
        encoded = _load_json(self.member(PIPELINES), PIPELINES, list)
        found: tuple[PipelinePlan, ...] = decode(_PIPELINES, encoded, "pipelines")
        if any(p.gpu for p in found):
            raise PlanError(f"{PIPELINES}: the code for GPUs belongs into {GPU}")
        if GPU not in self.members or not with_gpu:
            return found
        gpu = _load_json(self.member(GPU), GPU)
        if list(gpu) != [p.name for p in found]:
            raise PlanError(f"{GPU}: its pipelines are not those of plan.json")
        return tuple(replace(p, gpu=decode(_GPU_PLANS, gpu[p.name], p.name)) for p in found)

    def cubins(self, encoded: Any) -> dict[str, tuple[Cubin, ...]]:
        found: dict[str, tuple[Cubin, ...]] = {}
        for part in decode(_CUBIN_PARTS, encoded, "cubins"):
            cubin = Cubin(part.kernels, bytes(self.member(part.member)))
            for arch in part.arches:
                found[arch] = (*found.get(arch, ()), cubin)
        return found

    def matching(self, prefix: str, suffix: str, wanted: bool = True) -> dict[str, memoryview]:
        """Members by what their names hold between prefix and suffix."""
        return {
            name[len(prefix) : -len(suffix)]: self.member(name)
            for name in self.members
            if wanted and name.startswith(prefix) and name.endswith(suffix)
        }

    def member(self, name: str) -> memoryview:
        if name not in self.members:
            raise PlanError(f"not a plan, or a damaged one: it has no member {name}")
        at = self.members[name]
        return self.file[at.offset : at.offset + at.size]

    def document(self) -> dict[str, Any]:
        data = self.member(PLAN)
        # The version first: a newer format may keep its hash elsewhere.
        document: dict[str, Any] = _load_json(data, PLAN)
        for field, ours in (("format", FORMAT_VERSION), ("abi", ABI_VERSION)):
            found = document.get(field)
            if type(found) is not int:
                raise PlanError(f"not a plan: plan.json has no `{field}` version")
            if found != ours:
                fix = "use a newer stagefuse" if found > ours else "compile it again"
                raise PlanError(
                    f"the plan has {field} version {found}, this stagefuse reads {ours}: {fix}"
                )
        expected = _COMMENT + hashlib.sha256(data).hexdigest()
        if self.comment != expected.encode():
            raise PlanError("plan.json is damaged: its hash is not the one in the zip's comment")
        return document

    def manifest(self, manifest: dict[str, Any], verify: bool) -> None:
        if set(manifest) | {PLAN} != set(self.members):
            odd = sorted((set(manifest) | {PLAN}) ^ set(self.members))
            raise PlanError(f"the members are not those that plan.json lists: {', '.join(odd)}")
        for name, entry in manifest.items():
            if not isinstance(entry, dict) or entry.get("size") != self.members[name].size:
                raise PlanError(f"member {name} does not have the size that plan.json lists")
            if name != WEIGHTS or verify:
                if hashlib.sha256(self.member(name)).hexdigest() != entry.get("sha256"):
                    raise PlanError(f"member {name} is damaged: its hash differs")
        header = _header_bytes(self.member(WEIGHTS))
        entry = manifest[WEIGHTS]
        if hashlib.sha256(header).hexdigest() != entry.get("header_sha256"):
            raise PlanError(f"the header of {WEIGHTS} is damaged: its hash differs")

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        data = self.member(WEIGHTS)
        header = _header_bytes(data)
        body = data[len(header) :]
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name, entry in _load_json(header[8:], WEIGHTS).items():
            if not name.startswith(("__padding__", "__metadata__")):
                arrays[name] = _array(body, name, entry)
        return arrays


def _may_index(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array may hold positions, which kernels take for what they were while compiling;
    8 bits hold few, and large arrays of them are weights."""
    small = array.nbytes <= _SMALL_BYTES
    return array.dtype.kind in "iu" and (array.dtype.itemsize > 1 or small)


def _ptx(arch: str, data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise PlanError(f"kernels/{arch}.ptx is damaged: not text") from None


def _header_bytes(data: memoryview) -> memoryview:
    if len(data) < 8:
        raise PlanError(f"{WEIGHTS} is truncated")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(len(data) - 8, _MAX_HEADER):
        raise PlanError(f"the header of {WEIGHTS} is longer than the member")
    return data[: 8 + length]


def _array(body: memoryview, name: str, entry: Any) -> np.ndarray[Any, Any]:
    try:
        dtype = _FROM_SAFETENSORS[entry["dtype"]].numpy
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        sound = all(type(n) is int and n >= 0 for n in numbers) and len(shape) <= 32
    except (KeyError, TypeError, ValueError):
        raise PlanError(f"{WEIGHTS}: the entry of {name!r} is damaged") from None
    if not sound or begin > end or end > len(body) or end - begin != size or begin % ALIGNMENT:
        raise PlanError(f"{WEIGHTS}: the data of {name!r} is not where its entry says")
    return np.ndarray(tuple(shape), dtype, buffer=body[begin:end])


def _load_json(data: memoryview | bytes, name: str, kind: type[Any] = dict) -> Any:
    try:
        value = json.loads(bytes(data).decode())
    except (ValueError, RecursionError):
        raise PlanError(f"{name} is damaged: not JSON") from None
    if not isinstance(value, kind):
        raise PlanError(f"{name} is damaged: not a JSON {'object' if kind is dict else 'array'}")
    return value


def _text(document: dict[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str):
        raise PlanError(f"plan.json: `{name}` is missing")
    return value
