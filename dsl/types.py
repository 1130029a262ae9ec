"""Tensor types: a dtype and a shape of dimension expressions."""

from __future__ import annotations

from .dims import Expr
from .dtypes import DType
from .frozen import frozen


@frozen
class TensorType:
    """A dtype with a shape, outermost dimension first; `()` is a scalar."""

    dtype: DType
    shape: tuple[Expr, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        if not self.shape:
            return self.dtype.name
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)
