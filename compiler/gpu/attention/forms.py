"""How blocks of attention by warpgroups may be made up, by the size of heads."""

from __future__ import annotations

from collections.abc import Iterable

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import Load, Op
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.scalar import FUNCTIONS
from stagefuse.dsl.frozen import frozen

GROUP_ROWS = 64
"""Rows of queries that a warpgroup has."""
HEAVY = 8
"""Operations of a function of scores, up to which three warpgroups have registers for it."""


@frozen
class Form:
    """How a block works: `keys` at a time, what registers and shared memory hold; `readers` are the
    warpgroups that multiply, in `turns` or as they come. `registers`: of a thread that copies, and
    of one that multiplies, as many together as all had before; `wide`, where tiles are counted in
    64 bits, of which copying takes more."""

    keys: int
    readers: int
    turns: bool
    registers: tuple[int, int]
    wide: tuple[int, int]

    @property
    def rows(self) -> int:
        return self.readers * GROUP_ROWS

    @property
    def time(self) -> int:
        """What a block's keys take, beside another form's."""
        return self.readers + 1


FORMS = {
    64: (
        Form(128, 3, True, (32, 160), (32, 160)),
        Form(128, 2, True, (24, 240), (56, 224)),
    ),
    128: (Form(128, 2, False, (24, 240), (56, 224)),),
    256: (Form(64, 2, True, (24, 240), (24, 240)),),
}
"""By elements of the wider heads, as measured. Where exponentials take as long as products, three
warpgroups that take turns leave fewer gaps."""


def forms_of(depth: int, columns: int, values: Iterable[KernelValue]) -> tuple[Form, ...]:
    """The forms for heads of so many elements, the best for many rows first; `values`: what scores
    and masks are. Where one of them is read its places need registers, and so does what a function
    of many operations, such as `tanh`, has under way."""
    forms = FORMS[max(depth, columns)]
    parts = [part for v in values for part in post_order(v)]
    light = not any(isinstance(p, Load) or _is_heavy(p) for p in parts)
    return tuple(f for f in forms if f.readers == 2 or light)


def _is_heavy(value: KernelValue) -> bool:
    return isinstance(value, Op) and FUNCTIONS[value.fn].flops > HEAVY
