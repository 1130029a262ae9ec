"""One identity a module: the folders' bare names never import, only `stagefuse.<folder>` does."""

import gc
import sys

for _name in ("dsl", "compiler", "runtime"):
    sys.modules[_name] = None  # type: ignore[assignment]

gc.set_threshold(200_000, 20, 20)
"""A run holds much that stays, which collections as often as usual walk for a tenth of its time."""
