"""Numbers, sizes and lists as source text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.types import TensorType


def type_text(type: TensorType) -> str:
    """The type of a parameter or result: `bool` alone is a constant of the compilation."""
    return "bool[]" if str(type) == "bool" else str(type)


def literal(value: Any) -> str:
    """A number as a literal that rounds to it; infinities and NaN are constants of `math`."""
    kind = getattr(value, "dtype", None)
    if isinstance(value, bool) or (kind is not None and kind.kind == "b"):
        return str(bool(value))
    if isinstance(value, int) or (kind is not None and kind.kind in "iu"):
        return str(int(value))
    number = float(value)
    if math.isnan(number):
        return "math.NAN"
    if math.isinf(number):
        return "math.INF" if number > 0 else "-math.INF"
    narrow = kind is not None and kind.kind == "f" and kind.itemsize == 4
    text = str(value) if narrow else repr(number)
    return text if re.search(r"[.e]", text) else f"{text}.0"


def size_text(size: Expr | int) -> str:
    """A size as an expression of a body, where `min` of a type is `minimum`."""
    text = str(size)
    return re.sub(r"\b(min|max)\(", lambda m: f"{m[1]}imum(", text)


def listed(items: Iterable[Any]) -> str:
    """`[a, b]` of sizes, numbers or texts."""
    return f"[{', '.join(i if isinstance(i, str) else size_text(i) for i in items)}]"


def pairs(items: Iterable[tuple[Any, Any]]) -> str:
    """`[(1, 1), (0, 2)]`: the widths of `pad`."""
    return f"[{', '.join(f'({size_text(a)}, {size_text(b)})' for a, b in items)}]"


def cast(dtype: str, text: str) -> str:
    assert dtype in DTYPES
    return f"{dtype}({text})"
