"""The checker: from a syntax tree to a checked program, or diagnostics.

Bodies are evaluated with symbolic values: functions are inlined, loops unrolled and branches
chosen, and every operation on tensors is recorded with its type and place.
"""

from .run import check

__all__ = ["check"]
