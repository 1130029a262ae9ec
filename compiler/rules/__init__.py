"""Local rules over the dataflow graph, as one table."""

from __future__ import annotations

from .fitted import RULES as FITTED
from .pointwise import RULES as POINTWISE
from .record import Match, Rule
from .structure import RULES as STRUCTURE

RULES: tuple[Rule, ...] = (*POINTWISE, *STRUCTURE, *FITTED)
"""All rules, in the order in which they are tried."""

__all__ = ["RULES", "Match", "Rule"]
