"""What a kernel has: the functions that it may call, and where its variables lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagefuse.dsl.frozen import frozen

from .granules import Granules
from .program import Code, aligned, alignment, byte_size

if TYPE_CHECKING:
    from .program import Program


MOST_CALLS = 64
"""How deep calls may be nested."""
STACK_BYTES = 4096
"""How much a thread may allocate on its stack."""


@frozen
class Layout:
    """The memory of a kernel: offsets of shared variables, where dynamic shared memory begins,
    the bytes of local memory that a thread may need, and where its stack begins in there."""

    codes: tuple[Code, ...]
    shared: dict[str, int]
    dynamic_offset: int
    local_bytes: int
    stack_offset: int
    granules: Granules
    uses_reserved: bool

    def shared_variable(self, offset: int) -> str:
        """What lies at an offset of shared memory, in words; "" where there is but one thing."""
        places = {key.rsplit(":", 1)[-1]: at for key, at in self.shared.items()}
        if not places:
            return ""
        places["dynamic shared memory"] = self.dynamic_offset
        name = max((n for n, at in places.items() if at <= offset), key=places.__getitem__)
        return f"{name} + {offset - places[name]}"


def lay_out(program: Program, entry: Code) -> Layout:
    """The layout of a kernel: only what it, and what it calls, names takes part."""
    codes = _reached(program, entry)
    places = [place for code in codes for place in code.shared]
    named = {name for code in codes for name in code.mentions}
    module = program.globals.places
    places += [p for name, p in module.items() if p.space == "shared" and name in named]
    offset, found = 0, dict[str, int]()
    for place in places:
        offset = aligned(offset, alignment(place.variable))
        found[place.key] = offset
        offset += byte_size(place.variable)
    local = sum(aligned(code.local_bytes, 16) for code in codes[1:])
    local = aligned(entry.local_bytes, 16) + local if local else entry.local_bytes
    if any(code in _reached(program, *_called(program, code)) for code in codes):
        local *= MOST_CALLS  # a function calls itself
    stack = aligned(local, 16)
    if any(code.uses_stack for code in codes):
        local = stack + STACK_BYTES
    granules = entry.granules
    for code in codes:
        granules = granules.joined(code.granules)
    dynamic = aligned(offset, _dynamic_alignment(program, codes, named))
    return Layout(
        codes, found, dynamic, local, stack, granules, any(c.uses_reserved for c in codes)
    )


def _dynamic_alignment(program: Program, codes: tuple[Code, ...], named: set[str]) -> int:
    dynamic = [p for name, p in program.globals.places.items() if name in named]
    dynamic += [place for code in codes for place in code.dynamic]
    return max([16, *(alignment(p.variable) for p in dynamic if p.space == "dynamic")])


def _called(program: Program, code: Code) -> list[Code]:
    """The functions that a function may call."""
    found = [program.codes[name] for name in sorted(code.mentions & set(program.codes))]
    if code.calls_pointers:
        found += [c for c in program.codes.values() if not c.function.is_entry]
    return found


def _reached(program: Program, *first: Code) -> tuple[Code, ...]:
    """Functions and all those that they may call, directly or through pointers."""
    found: dict[str, Code] = {}
    left = list(first)
    while left:
        code = left.pop()
        if code.name in found:
            continue
        found[code.name] = code
        left += _called(program, code)
    return tuple(found.values())
