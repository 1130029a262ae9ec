"""What a child made by `fork` needs of a parent with several threads, of which it has one.

A lock that another thread held would be held forever in the child. Those made here are taken by the
thread that forks, so that what they guard is whole in both processes. Source: fork(2), and
`pthread_atfork`(3), which `os.register_at_fork` is for Python.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TypeAlias

Lock: TypeAlias = "threading.RLock"
PATIENCE_S = 1.0
"""For a lock whose owner may itself wait for one that the thread which forks has."""

_locks: weakref.WeakValueDictionary[int, Lock] = weakref.WeakValueDictionary()
"""By identity: other threads may make some while these are listed, which a set does not bear."""
_forking = threading.local()
"""Of each thread: the locks that it took to fork."""


def lock() -> Lock:
    """A lock for short work. Re-entrant, as a garbage collection inside may call a pipeline."""
    made = threading.RLock()
    _locks[id(made)] = made
    return made


def _before() -> None:
    known = [ref() for ref in _locks.valuerefs()]
    _forking.held = [x for x in known if x is not None and x.acquire(timeout=PATIENCE_S)]


def _after() -> None:
    for taken in _forking.held:
        taken.release()
    _forking.held = []


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
