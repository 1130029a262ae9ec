"""Python's garbage collector, while many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_rests() -> Iterator[None]:
    """Makes no collections meanwhile.

    Tables of a module are a hundred thousand objects, which the collector would walk again and
    again while they are made, for more time than making them takes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
