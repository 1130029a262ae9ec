"""Python's garbage collector, while many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_rests() -> Iterator[None]:
    """Makes no collections meanwhile.

    A compiled pipeline is a hundred thousand objects and more, as a module's tables in the emulator
    are, which the collector would walk again and again while they are made: in a process that holds
    much already, for a tenth of the time of compiling. Of what is dropped meanwhile little is in
    cycles, and that is collected afterwards.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
