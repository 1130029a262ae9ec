"""The reference page of the instruction table: `python -m stagefuse.compiler.ptx.reference`.

Prints the page; `--write` writes it to `docs/ptx.md`, where a test compares it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from .table import SLOTS, Form, families, forms
from .table import __name__ as table_name

INTRODUCTION = """\
# PTX: the instruction table

<!-- Written by `python -m stagefuse.compiler.ptx.reference --write`; do not edit. -->

Every instruction that we write, read and run is a row of the table in
[compiler/ptx/table](../compiler/ptx/table). The row drives the builder, which refuses a wrong
operand or target where it is built, the reader's checks, the emulator in
[runtime/emulator](../runtime/emulator), and this page. A test assembles every row with `ptxas`
for `sm_80`, `sm_89` and `sm_90a`.

```python
import numpy as np
from stagefuse.compiler.ptx import ModuleBuilder, print_module, read_module
from stagefuse.runtime import emulator

b = ModuleBuilder("sm_80")
k = b.entry("scale", [("x", "u64"), ("n", "u32")])
i = k.op("mad.lo.u32", k.special("ctaid.x"), 64, k.special("tid.x"))
with k.when(k.op("setp.lt.u32", i, k.param("n"))):
    at = k.op("add.u64", k.param("x"), k.op("mul.wide.u32", i, 4))
    k.op("st.global.f32", at, k.op("mul.rn.f32", k.op("ld.global.f32", at), 2.0))
text = print_module(b.module())
assert read_module(text) == b.module()

x = np.arange(100, dtype=np.float32)
record = emulator.load(text).launch("scale", grid=2, block=64, args=[x, np.uint32(100)])
assert (x == 2 * np.arange(100)).all() and record.instructions["mul.rn.f32"] == 100
```

What a kernel does wrong is a `Fault` with the line of the PTX and of the source:

```python
try:
    emulator.load(text).launch("scale", grid=2, block=64, args=[x[:90].copy(), np.uint32(100)])
except emulator.Fault as fault:
    assert (fault.kind, fault.thread) == ("out-of-bounds", (26, 0, 0))
```

| kind | means |
|---|---|
| `out-of-bounds` | an access outside every buffer, or that does not lie wholly in one |
| `misaligned` | an address that is no multiple of the size of the access |
| `uninitialised` | a read of memory that nothing wrote; local words may be copied, \
shared ones dropped. Something that depends on a register that nothing wrote: an address, \
a guard, global memory |
| `race` | two accesses, one a write, that nothing orders; or a read before a copy was waited for |
| `barrier` | a barrier that threads of the warp do not reach, or others pass by; a wrong mask; \
a wrong use of an mbarrier or of `setmaxnreg` |
| `deadlock` | threads that wait for what never happens |
| `trap` | the kernel stopped itself, by `trap` or a failed assertion; \
or the metadata of `mma.sp` makes no sense |

## How to read the tables

`{.x}` may be left out. A name in the pattern that is no word of PTX stands for one of the words
in *where*, or for one of these:

"""


def reference() -> str:
    """The page."""
    return INTRODUCTION + "\n".join((*_slots(), *_families())) + "\n"


def _slots() -> Iterator[str]:
    yield "| name | words |"
    yield "|---|---|"
    used = {slot.name for rows in forms().values() for form in rows for slot in form.slots
            if slot.name not in form.choices}  # fmt: skip
    for name, words in SLOTS.items():
        if len(words) > 1 and name in used:
            yield f"| {name} | {', '.join(f'`{w}`' for w in words)} |"
    yield ""
    yield "Operands: `>d:T` is a result, `[a]` an address, `#i` a constant, `!p` a predicate that"
    yield "may be inverted, `@l` a label; `*4` four in braces, `~` a wider register will do, `|p` a"
    yield "second result that may be missing, `?` an operand that may be missing."


def _families() -> Iterator[str]:
    from importlib import import_module

    for name in families():
        module = import_module(f"{table_name}.{name}")
        title, _, source = (module.__doc__ or "").strip().splitlines()[0].partition(" (PTX ISA")
        yield f"\n## {title.rstrip('.')}\n"
        if source:
            yield f"PTX ISA{source.rstrip('.').rstrip(')')}.\n"
        yield "| instruction | operands | does | where | since |"
        yield "|---|---|---|---|---|"
        yield from dict.fromkeys(_row(form) for form in module.FORMS)


def _row(form: Form) -> str:
    where = "; ".join(f"{k}: {v.strip()}" for k, v in form.choices.items()
                      if k in {slot.name for slot in form.slots} and " " in v.strip())  # fmt: skip
    since = f"PTX {form.version[0]}.{form.version[1]}"
    if form.arch:
        since += f", sm_{form.arch} only"
    elif form.target:
        since += f", sm_{form.target}"
    cells = (f"`{form.pattern()}`", f"`{form.operands}`" if form.operands else "", form.summary,
             where, since)  # fmt: skip
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "ptx.md"
    if "--write" in sys.argv[1:]:
        page.write_text(reference(), encoding="utf-8")
    else:
        sys.stdout.write(reference())


if __name__ == "__main__":
    main()
