"""NumPy, imported when it is first used: a program is checked without it, in half the time.

`np` is the module. `later` is for tables: `later.exp` is a function that calls `numpy.exp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class _Module:
    def __getattr__(self, name: str) -> Any:
        import numpy

        return getattr(numpy, name)


class _Function:
    """Stands for one of NumPy's functions, and for its attributes."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(_NUMPY, self.__name__)(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_NUMPY, self.__name__), name)


class _Later:
    def __getattr__(self, name: str) -> _Function:
        return _Function(name)


_NUMPY = _Module()

if TYPE_CHECKING:
    import numpy as later
    import numpy as np
else:
    np = _NUMPY
    later = _Later()

__all__ = ["later", "np"]
