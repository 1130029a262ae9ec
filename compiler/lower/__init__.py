"""Groups of nodes become kernels: loops, reductions at the right depth, stores.

`kernel.lower` picks the form by the group's kind; a form (`pointwise`, `rows`, `products`,
`sequences`) makes the loops, `panels` what products pack; `values` computes what they store;
`blocks` holds what is made.
"""

from .blocks import Sites
from .kernel import FORMS, Lowered, finish, lower

__all__ = ["FORMS", "Lowered", "Sites", "finish", "lower"]
