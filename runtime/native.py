"""Native code in this process: loads ELF objects without a linker, and knows the machine's level.

`NativeObject` maps the sections of a relocatable x86-64 object, resolves its few libc names,
applies the relocations and only then makes code executable. Every offset is checked against the
file first: damaged bytes raise `ObjectError`. The mapping stays until `close`, which also ends
the threads that the object's pool may have started.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from stagefuse.compiler.plan import UNITS
from stagefuse.dsl.frozen import frozen

PAGE = 4096
READ, WRITE, EXECUTE = 1, 2, 4
MAP_PRIVATE_ANONYMOUS = 0x22
SHT_PROGBITS, SHT_SYMTAB, SHT_RELA, SHT_NOBITS, SHT_REL = 1, 2, 4, 8, 9
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
R_64, R_PC32, R_PLT32, R_GOTPCREL, R_32, R_32S, R_PC64 = 1, 2, 4, 9, 10, 11, 24
R_GOTPCRELX, R_REX_GOTPCRELX = 41, 42
MAX_IMAGE = 1 << 30
MAX_SECTIONS = 4096
MAX_ALIGN = 4096
# The only names outside itself that generated code may use.
EXTERNAL = frozenset(
    "memset memcpy memmove memcmp fmod fmodf pthread_create pthread_join syscall".split()
)
STUB = 16  # bytes of a jump to an external function
_V3 = frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave".split())
_AMX = frozenset("amx_tile amx_bf16 amx_int8".split())
_ZEN_5 = 26  # the family, of Zen 4: 25; Linux, arch/x86/kernel/cpu/amd.c
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())


class ObjectError(ValueError):
    """An object file that is damaged or of a kind this loader does not know."""


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, integer, integer, integer, ctypes.c_long]
    libc.mprotect.argtypes = [pointer, size, integer]
    libc.munmap.argtypes = [pointer, size]
    return libc


def _external(name: str) -> int:
    if name not in EXTERNAL:
        raise ObjectError(f"the object needs an unknown function: {name!r}")
    try:
        function = getattr(_libc(), name)
    except AttributeError:
        function = getattr(ctypes.CDLL("libpthread.so.0"), name)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def detect_level(cpuinfo: str | None = None) -> str | None:
    """The best level of x86-64 this machine runs: 'v4', 'v3' or None."""
    flags = _own_words("flags") if cpuinfo is None else _words("flags", cpuinfo)
    return "v4" if flags >= _V4 else "v3" if flags >= _V3 else None


def _words(name: str, cpuinfo: str) -> set[str]:
    """What is said of the first processor."""
    for line in cpuinfo.splitlines():
        found, _, value = line.partition(":")
        if found.strip() == name:
            return set(value.split())
    return set()


@lru_cache(maxsize=4)
def _own_words(name: str) -> set[str]:
    """What is said of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    return _words(name, text)


def units(level: str = "v4", tiles: bool = True) -> int:
    """Which of `plan.UNITS` code of a level may use on this machine; no AMX without `tiles`.

    Prefetching ends with a page on Intel's processors (Intel 64 and IA-32 Optimization Reference
    Manual, chapter 9, Hardware Prefetching of Data), and as measured on AMD's of Zen 5 but not of
    Zen 4; AMD's divide a vector of 512 bits in 7 cycles, Intel's in 16.
    """
    vendor = _own_words("vendor_id")
    is_amd = "AuthenticAMD" in vendor
    ends = "GenuineIntel" in vendor or (is_amd and _family() >= _ZEN_5)
    pages = UNITS["pages"] if ends else 0
    if level != "v4":
        return pages
    pages |= UNITS["quotients"] if is_amd else 0
    flags = {"quads": "avx512_vnni", "halves": "avx512_bf16"}
    found = sum(UNITS[name] for name, flag in flags.items() if flag in _own_words("flags"))
    return pages | found | (UNITS["tiles"] if tiles and may_use_tiles() else 0)


def _family() -> int:
    """The processor's family; 0 if it is not said."""
    return max((int(word) for word in _own_words("cpu family") if word.isdecimal()), default=0)


@lru_cache(maxsize=1)
def may_use_tiles() -> bool:
    """Whether this machine has AMX for bf16 and 8 bits, and lets this process use it, which it
    must ask once.

    Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    if not _own_words("flags") >= _AMX:
        return False
    return bool(_libc().syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


@dataclass
class _Section:
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    place: int = -1  # offset in the image; -1 if not loaded


@dataclass
class _Reader:
    """Checked reads of the file."""

    data: bytes
    sections: list[_Section] = field(default_factory=list)

    def unpack(self, form: str, offset: int) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if offset < 0 or offset + size > len(self.data):
            raise ObjectError(f"the object ends before byte {offset + size}")
        return struct.unpack_from(form, self.data, offset)

    def section(self, number: int) -> _Section:
        if not 0 <= number < len(self.sections):
            raise ObjectError(f"the object has no section {number}")
        return self.sections[number]

    def contents(self, section: _Section) -> bytes:
        if section.kind == SHT_NOBITS:
            return b""
        if section.offset + section.size > len(self.data):
            raise ObjectError("a section of the object ends beyond the file")
        return self.data[section.offset : section.offset + section.size]

    def text(self, table: _Section, offset: int) -> str:
        raw = self.contents(table)
        end = raw.find(b"\0", offset)
        if offset >= len(raw) or end < 0:
            raise ObjectError("a name of the object lies outside its table")
        try:
            return raw[offset:end].decode("ascii")
        except UnicodeDecodeError:
            raise ObjectError("a name of the object is not text") from None


def _read_sections(reader: _Reader) -> None:
    magic, kind, machine = reader.unpack("<16sHH", 0)
    if magic[:6] != b"\x7fELF\x02\x01" or (kind, machine) != (1, 62):
        raise ObjectError("not a relocatable x86-64 ELF object")
    (start,) = reader.unpack("<Q", 40)
    entry_size, count, names = reader.unpack("<HHH", 58)
    if entry_size != 64 or count > MAX_SECTIONS:
        raise ObjectError("the object's section table is damaged")
    raw = [reader.unpack("<IIQQQQIIQQ", start + 64 * i) for i in range(count)]
    for _, kind, flags, _, offset, size, link, info, align, _ in raw:
        reader.sections.append(_Section("", kind, flags, offset, size, link, info, max(align, 1)))
    table = reader.section(names)
    for section, fields in zip(reader.sections, raw, strict=True):
        section.name = reader.text(table, fields[0])


def _group(section: _Section) -> int:
    """0 code, 1 constants, 2 variables."""
    if section.flags & SHF_EXECINSTR:
        return 0
    return 2 if section.flags & SHF_WRITE else 1


@dataclass
class _Layout:
    """Where the groups of sections begin, page aligned: code, constants, variables, end."""

    starts: list[int]
    stubs: int
    slots: int


def _lay_out(reader: _Reader, externals: int) -> _Layout:
    position, starts, stubs, slots = 0, [], 0, 0
    for group in range(3):
        position = -(-position // PAGE) * PAGE
        starts.append(position)
        for section in reader.sections:
            wanted = section.flags & SHF_ALLOC and section.name != ".eh_frame"
            if not wanted or _group(section) != group:
                continue
            if section.align & (section.align - 1) or section.align > MAX_ALIGN:
                raise ObjectError("the object asks for a strange alignment")
            position = -(-position // section.align) * section.align
            section.place = position
            position += section.size
            if position > MAX_IMAGE:
                raise ObjectError("the object is too large")
        if group == 0:
            stubs = position = -(-position // STUB) * STUB
            position += STUB * externals
        if group == 1:
            slots = position = -(-position // 8) * 8
            position += 8 * externals
    starts.append(-(-max(position, 1) // PAGE) * PAGE)
    return _Layout(starts, stubs, slots)


@frozen
class _Symbol:
    name: str
    section: int  # 0 undefined
    value: int
    is_global: bool


def _read_symbols(reader: _Reader) -> list[_Symbol]:
    tables = [s for s in reader.sections if s.kind == SHT_SYMTAB]
    if len(tables) != 1 or tables[0].size % 24:
        raise ObjectError("the object's symbol table is damaged")
    names = reader.section(tables[0].link)
    symbols = []
    for i in range(len(reader.contents(tables[0])) // 24):
        name, info, _, section, value, size = reader.unpack("<IBBHQQ", tables[0].offset + 24 * i)
        if 0 < section < 0xFF00 and value + size > reader.section(section).size:
            raise ObjectError("a symbol of the object lies outside its section")
        symbols.append(_Symbol(reader.text(names, name), section, value, info >> 4 != 0))
    return symbols


class _Image:
    """The mapped bytes while they are still writable."""

    def __init__(self, size: int) -> None:
        self.size = size
        mapped = _libc().mmap(None, size, READ | WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0)
        if mapped in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("no memory for generated code")
        self.base = int(mapped)

    def write(self, place: int, data: bytes) -> None:
        if place < 0 or place + len(data) > self.size:
            raise ObjectError("a relocation of the object writes outside it")
        ctypes.memmove(self.base + place, data, len(data))

    def protect(self, start: int, end: int, mode: int) -> None:
        if end > start and _libc().mprotect(self.base + start, end - start, mode):
            raise OSError(ctypes.get_errno(), "mprotect of generated code failed")

    def unmap(self) -> None:
        _libc().munmap(self.base, self.size)


class NativeObject:
    """A loaded object file; `address` gives its global functions."""

    def __init__(self, data: bytes) -> None:
        reader = _Reader(bytes(data))
        _read_sections(reader)
        symbols = _read_symbols(reader)
        names = sorted({s.name for s in symbols if s.section == 0 and s.name})
        found = {name: _external(name) for name in names}
        layout = _lay_out(reader, len(names))
        image = _Image(layout.starts[3])
        try:
            self._fill(reader, image, symbols, found, layout)
        except BaseException:
            image.unmap()
            raise
        self._image = image
        self._symbols = {
            s.name: image.base + reader.section(s.section).place + s.value
            for s in symbols
            if s.is_global and 0 < s.section < 0xFF00 and reader.section(s.section).place >= 0
        }
        self._closed = False
        if "sf_pool_reset" in self._symbols:
            _LIVE.add(self)

    @staticmethod
    def _fill(
        reader: _Reader,
        image: _Image,
        symbols: list[_Symbol],
        found: dict[str, int],
        layout: _Layout,
    ) -> None:
        for section in reader.sections:
            if section.place >= 0:
                image.write(section.place, reader.contents(section))
        stubs = {name: layout.stubs + STUB * i for i, name in enumerate(found)}
        slots = {name: layout.slots + 8 * i for i, name in enumerate(found)}
        for name, address in found.items():
            image.write(stubs[name], b"\xff\x25\0\0\0\0" + struct.pack("<Q", address))
            image.write(slots[name], struct.pack("<Q", address))
        for section in reader.sections:
            if section.kind == SHT_REL:
                raise ObjectError("the object holds relocations of an unknown form")
            if section.kind != SHT_RELA:
                continue
            target = reader.section(section.info)
            if target.place >= 0:
                _relocate(reader, image, section, target, symbols, (stubs, slots))
        starts = layout.starts
        image.protect(starts[0], starts[1], READ | EXECUTE)
        image.protect(starts[1], starts[2], READ)

    def address(self, name: str) -> int:
        """Where a global symbol lies. Raises KeyError."""
        return self._symbols[name]

    def names(self) -> tuple[str, ...]:
        """The global symbols, sorted."""
        return tuple(sorted(self._symbols))

    def function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        """A callable with ctypes types; it releases Python's lock. Keep this object alive."""
        call: Callable[..., Any] = ctypes.CFUNCTYPE(result, *arguments)(self.address(name))
        return call

    def use_units(self, units: int) -> None:
        """Which of `plan.UNITS` products may use, of those that there are. At first none."""
        if "sf_use_units" in self._symbols:
            self.function("sf_use_units", None, ctypes.c_int32)(units)

    def close(self) -> None:
        """Ends the pool's threads and unmaps the code. Nothing of it may be running."""
        if self._closed:
            return
        self._closed = True
        _LIVE.discard(self)
        if "sf_pool_stop" in self._symbols:
            self.function("sf_pool_stop", None)()
        self._image.unmap()


_LIVE: weakref.WeakSet[NativeObject] = weakref.WeakSet()


def _after_fork() -> None:
    for loaded in list(_LIVE):
        loaded.function("sf_pool_reset", None)()


os.register_at_fork(after_in_child=_after_fork)


def _relocate(
    reader: _Reader,
    image: _Image,
    section: _Section,
    target: _Section,
    symbols: list[_Symbol],
    tables: tuple[dict[str, int], dict[str, int]],
) -> None:
    stubs, slots = tables
    for i in range(len(reader.contents(section)) // 24):
        offset, info, addend = reader.unpack("<QQq", section.offset + 24 * i)
        kind, number = info & 0xFFFFFFFF, info >> 32
        wide = kind in (R_64, R_PC64)
        if offset + (8 if wide else 4) > target.size:
            raise ObjectError("a relocation of the object lies outside its section")
        if number >= len(symbols):
            raise ObjectError("a relocation of the object names no symbol")
        place = target.place + offset
        symbol = symbols[number]
        if kind in (R_GOTPCREL, R_GOTPCRELX, R_REX_GOTPCRELX):
            if symbol.name not in slots:
                raise ObjectError("the object refers to itself through a table")
            value = slots[symbol.name] + addend - place
        else:
            value = image.base + _symbol_place(reader, symbol, stubs) + addend
            if kind in (R_PC32, R_PLT32, R_PC64):
                value -= image.base + place
            elif kind not in (R_64, R_32, R_32S):
                raise ObjectError(f"the object holds a relocation of unknown type {kind}")
        image.write(place, _packed(value, kind))


def _symbol_place(reader: _Reader, symbol: _Symbol, stubs: dict[str, int]) -> int:
    if symbol.section == 0 and symbol.name in stubs:
        return stubs[symbol.name]
    if not 0 < symbol.section < 0xFF00:
        raise ObjectError("the object uses a symbol that lies nowhere")
    place = reader.section(symbol.section).place
    if place < 0:
        raise ObjectError("the object uses a symbol of a section that is not loaded")
    return place + symbol.value


def _packed(value: int, kind: int) -> bytes:
    if kind in (R_64, R_PC64):
        return struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)
    low, high = (0, 1 << 32) if kind == R_32 else (-(1 << 31), 1 << 31)
    if not low <= value < high:
        raise ObjectError("a relocation of the object does not reach its target")
    return struct.pack("<I", value & 0xFFFFFFFF)
