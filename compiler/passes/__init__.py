"""The passes over the dataflow graph, one module each, and the one list that orders them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from .record import INVARIANTS, Pass


@cache
def discovered() -> dict[str, type[Pass]]:
    """Every pass that a module of this package defines, by name."""
    found: dict[str, type[Pass]] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        for value in vars(importlib.import_module(f"{__name__}.{module}")).values():
            if isinstance(value, type) and issubclass(value, Pass) and value is not Pass:
                found[value.name] = value
    return found


def pipeline_of(
    load: Callable[[str, str], Any],
    narrow: bool = False,
    integers: bool = False,
    channels_last: bool = False,
    shorten_sorts: bool = False,
    filters: bool = True,
    single_queries: bool = False,
    panel: int | None = None,
) -> tuple[Pass, ...]:
    """The passes from the checked program's graph to the one that is fused, in order; with
    `narrow`, to one whose kernels convert what weights are stored in as they read it; with
    `integers`, to one whose products may be of 8-bit integers on a CPU; with
    `channels_last`, to one whose images lie as kernels for GPUs want them, with `shorten_sorts`, to
    one whose sorts have as many rows as GPUs want, with `filters`, to one whose convolutions
    have what the CPU's filter by, and with `single_queries`, to one whose attention of a single
    query is made of products as that of many is; with `panel`, to one whose products have panels of
    so many columns."""
    from .align_rows import AlignRows
    from .batch_steps import BatchSteps
    from .channels_last import ChannelsLast
    from .check_first import CheckFirst
    from .find_products import FindProducts
    from .finish_products import FinishProducts
    from .float_sums import FloatSums
    from .fold_constants import FoldConstants
    from .join_products import JoinProducts
    from .minimal_filters import MinimalFilters
    from .own_results import OwnResults
    from .seen_taps import SeenTaps
    from .shorten_sorts import ShortenSorts
    from .simplify import Simplify

    return (
        Simplify(),
        BatchSteps(),
        *((ShortenSorts(),) if shorten_sorts else ()),
        JoinProducts(),
        AlignRows(single_queries),
        *((SeenTaps(load),) if filters else ()),
        FindProducts(not channels_last, narrow, integers, single_queries, load, panel),
        *((FloatSums(),) if integers else ()),
        *((ChannelsLast(), FinishProducts()) if channels_last else ()),
        FoldConstants(load, narrow),
        *((MinimalFilters(load),) if filters else ()),
        OwnResults(),
        CheckFirst(),
    )


__all__ = ["INVARIANTS", "Pass", "discovered", "pipeline_of"]
