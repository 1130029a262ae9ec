"""The parser's tables, which Lark needs a quarter of a second to make, kept between processes.

They lie in the user's cache folder, named by a hash of all that they depend on; Lark writes and
reads them itself. Where that folder cannot be used, or a file in it is not what it should be,
they are made anew. `STAGEFUSE_CACHE` names another folder; if it is empty, nothing is kept.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress

import lark

from .cache import cache_folder, keep


def kept(make: Callable[[], lark.Lark], *depends: str) -> lark.Lark:
    """The parser that `make` gives, from the cache if it is there for the same `depends`."""
    folder = cache_folder()
    if folder is None:
        return make()
    versions = (lark.__version__, sys.implementation.cache_tag or "", *map(str, sys.version_info))
    text = "\0".join((*depends, *versions, __file__))
    path = folder / f"grammar-{hashlib.sha256(text.encode()).hexdigest()[:32]}.lark"
    with suppress(Exception), path.open("rb") as file:  # whatever a broken file makes Lark raise
        return lark.Lark.load(file)
    parser = make()
    with suppress(OSError):
        keep(path, parser.save)
    return parser
