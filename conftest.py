"""One identity a module: the folders' bare names never import, only `stagefuse.<folder>` does."""

import sys

for _name in ("dsl", "compiler", "runtime"):
    sys.modules[_name] = None  # type: ignore[assignment]
