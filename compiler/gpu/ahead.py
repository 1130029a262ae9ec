"""Loads that are under way before what they read is taken apart."""

from __future__ import annotations

from collections.abc import Callable

from stagefuse.compiler.kernel_ir import Load

from .ir import Value
from .memory import Memory
from .values import ValueWriter


class AheadWriter(ValueWriter):
    """The body of a kernel, as far as it reads ahead."""

    def start_reading(
        self, load: Load, read: Callable[[Memory, str, int], tuple[Value, ...]] | None = None
    ) -> None:
        """Reads what a load without guards does, if that is not known, to be taken apart later;
        `read` gives registers for it, if that is not to be a load into new ones."""
        memory = self.memory[load.buffer]
        at, count, _ = self._access_of(memory, self.place(memory, load.indices), self._even(load))
        key = self._key_of(memory, at, count)
        if key not in self.under_way and self._reads(memory, key) is None:
            self.under_way[key] = (read or self.read_words)(memory, at, count)

    def start_reading_one(self, *loads: Load) -> None:
        """The same by one of some loads, of which the guards of one at most hold, for all of them:
        into the same registers, from where that one's elements lie."""
        code, memories = self.code, [self.memory[load.buffer] for load in loads]
        keys, counts = list[tuple[str, ...]](), set[int]()
        place: Value | None = None
        some: Value | None = None
        for load, memory in zip(loads, memories, strict=True):
            with self.when(self.all_of(load.guard)), self.scope():
                at, count, _ = self._access_of(
                    memory, self.place(memory, load.indices), self._even(load)
                )
                keys.append(self._key_of(memory, at, count))
                own = self.active
            counts.add(count)
            if own is None:
                return
            pointer = code.fresh("i64")
            base, _, offset = at[1:-1].partition("+")
            code.write("add.s64", pointer, base, offset or "0")
            place = pointer if place is None else own.select(pointer, place)
            some = own if some is None else own | some
        known = any(key in self.under_way for key in keys)
        if place is None or known or len(counts) > 1 or not all(m.constant for m in memories):
            return
        before, self.active = self.active, some
        words = self.read_words(memories[0], f"[{place.text}]", counts.pop())
        self.active = before
        self.under_way.update(dict.fromkeys(keys, words))
