"""A plan's kernels by arch: as text, a module each, and as machine code, in parts.

A part is a few kernels in the order in which they are made, so that ptxas is at work on one while
later ones are still being written. What is cut where depends on the kernels alone: the same source
gives the same bytes. Machine code runs on later devices of its major version ("Application
compatibility" in the CUDA C++ programming guide), so that a kernel that is the same for `sm_80` and
`sm_89` is assembled once, for the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from stagefuse.compiler.plan import Cubin

from .assemble import Assembled, AssemblerMissing, Assembly, Job, Usage
from .emit import Entry, module_text

FIRST, PART, LAST = 400, 4000, 1000
"""Lines of PTX in the first part, in those in the middle, each of twice those of the one before up
to that, and in the last: ptxas starts soon, and all cores are at work to the end. A process of
ptxas starts in about the time that 300 lines take."""
ROOM = ((".minnctapersm 1", 1024), (".maxnreg 200", 320))
"""What is said of kernels that spill, one after the other, and the most threads of a block of which
it can be said: more would not have so many registers each. Without a word on how many blocks are
wanted, ptxas trades a few spills for another block; given all registers, it sometimes begins so
many loads early that it spills again."""


@dataclass
class _Part:
    """Kernels in one piece of machine code, for some arches; it is assembled for the first."""

    arches: tuple[str, ...]
    names: list[str]
    lines: int = 0
    job: Job | None = None


class Modules:
    """The kernels of a plan's arches, assembled while others are still written."""

    def __init__(self, arches: Sequence[str], source_name: str) -> None:
        self.source_name = source_name
        self.entries: dict[str, dict[str, Entry]] = {arch: {} for arch in arches}
        self.parts: list[_Part] = []
        self.assembly: Assembly | None = None
        with suppress(AssemblerMissing):
            self.assembly = Assembly()

    def add(self, arches: Sequence[str], entry: Entry) -> None:
        """Kernels that arches have; one that they had before changes nothing."""
        fresh = [arch for arch in arches if entry.name not in self.entries[arch]]
        for arch in fresh:
            self.entries[arch][entry.name] = entry
        for together in _by_major(fresh):
            begun = sum(p.job is not None for p in self.parts)
            self._put(together, entry, min(FIRST << begun, PART))

    def _put(self, arches: tuple[str, ...], entry: Entry, most: int) -> None:
        """Adds a kernel to a part, which is complete if it has as many lines then."""
        part = next((p for p in self.parts if p.arches == arches and p.job is None), None)
        if part is None:
            part = _Part(arches, [])
            self.parts.append(part)
        part.names.append(entry.name)
        part.lines += entry.text.count("\n")
        if part.lines >= most:
            self._start(part)

    def _start(self, part: _Part) -> None:
        if self.assembly is not None:
            part.job = self.assembly.add(part.arches[0], self._text(part.arches[0], part.names))

    def start(self) -> None:
        """Has the last kernels assembled: there are no others."""
        last = [part for part in self.parts if part.job is None]
        self.parts = [part for part in self.parts if part.job is not None]
        for part in last:
            for name in part.names:
                self._put(part.arches, self.entries[part.arches[0]][name], LAST)
        for part in self.parts:
            if part.job is None:
                self._start(part)

    def stop(self) -> None:
        """Ends what is not waited for."""
        if self.assembly is not None:
            self.assembly.stop()

    def wait(self) -> None:
        """Returns when all is assembled, with room for what spilled. Raises InternalError."""
        if self.assembly is None:
            return
        self.assembly.wait()
        for hint, threads in ROOM:
            for part in self.parts:
                if self._give_room(part, hint, threads):
                    self._start(part)
            self.assembly.wait()

    def _give_room(self, part: _Part, hint: str, threads: int) -> bool:
        """Says of kernels that spill how many registers they may have; whether there are any."""
        usage, entries = _result(part).usage, self.entries[part.arches[0]]
        spilled = [
            n for n in part.names
            if (usage[n].spill_stores or usage[n].spill_loads)
            and not (entries[n].stays or entries[n].team.helpers)
            and entries[n].team.threads <= threads
        ]  # fmt: skip
        for name in spilled:
            roomy = entries[name].with_room(hint)
            for arch in part.arches:
                self.entries[arch][name] = roomy
        return bool(spilled)

    def texts(self) -> dict[str, str]:
        """The PTX of each arch, all its kernels in one module."""
        return {arch: self._text(arch, list(of)) for arch, of in self.entries.items()}

    def cubins(self) -> dict[str, tuple[Cubin, ...]]:
        """The machine code of each arch, where it could be assembled."""
        if self.assembly is None:
            return {}
        made = [(p.arches, Cubin(tuple(p.names), _result(p).cubin)) for p in self.parts]
        return {a: tuple(c for arches, c in made if a in arches) for a in self.entries}

    def usage(self) -> dict[str, dict[str, Usage]]:
        """What ptxas said of the kernels of each arch, where it could be asked."""
        found: dict[str, dict[str, Usage]] = {arch: {} for arch in self.entries}
        for part in self.parts if self.assembly is not None else ():
            for arch in part.arches:
                found[arch] |= _result(part).usage
        return found

    def assembled_for(self, arch: str, name: str) -> str:
        """The arch that a kernel of an arch was assembled for."""
        return next(p.arches[0] for p in self.parts if arch in p.arches and name in p.names)

    def _text(self, arch: str, names: Sequence[str]) -> str:
        return module_text([self.entries[arch][n] for n in names], arch, self.source_name)


def _result(part: _Part) -> Assembled:
    assert part.job is not None
    return part.job.result()


def _by_major(arches: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Arches that run the same machine code, the first one's."""
    plain = [arch for arch in arches if not arch.endswith("a")]
    for major in dict.fromkeys(arch[:-1] for arch in plain):
        yield tuple(arch for arch in plain if arch[:-1] == major)
    for arch in arches:
        if arch not in plain:
            yield (arch,)
