"""What every test may use, and how what is random in it is chosen.

Random *data* (`rng`) is fresh in each run. Random *programs* (`program_seed`, `chance`, and what
Hypothesis makes) are the same in each run: their seeds come of the test's own name. With `--fuzz
MINUTES` they are fresh too, and only the tests that have some run, again and again. A failure
prints the seeds; set in the environment, they give the same numbers and the same program again.

With `--soft-tiles` products use AMX on machines that have none; see `soft_tiles`.

In tests a bound that the verifiers can neither prove nor break is a failure.
"""

import os
import random
import secrets
import time
import zlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.runtime import native

from . import soft_tiles


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=float, metavar="MINUTES", help="run tests of random programs on fresh ones"
    )
    parser.addoption(
        "--soft-tiles", action="store_true", help="have products use AMX, in software if need be"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.fuzz is None and config.pluginmanager.has_plugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("fixed", derandomize=True)
        settings.load_profile("fixed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow ones first, so that none of them runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.option.fuzz is not None:
        left_out = [item for item in items if not _has_programs(item)]
        items[:] = [item for item in items if _has_programs(item)]
        config.hook.pytest_deselected(items=left_out)


def _has_programs(item: pytest.Item) -> bool:
    """Whether a test chooses programs, or what Hypothesis makes, at random."""
    if not isinstance(item, pytest.Function):
        return False
    return "program_seed" in item.fixturenames or hasattr(item.obj, "hypothesis")


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With `--fuzz`, all tests in a random order, as often as the minutes allow; in one process."""
    minutes = session.config.option.fuzz
    if minutes is None or session.config.option.collectonly or not session.items:
        return None
    end = time.monotonic() + 60 * minutes
    while True:
        turn = random.sample(session.items, len(session.items))
        for item, after in pairwise([*turn, None]):
            assert item is not None
            is_last = time.monotonic() >= end
            after = None if is_last else after
            item._report_sections.clear()  # what an earlier turn printed
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            if is_last:
                return True


@pytest.fixture(autouse=True, scope="session")
def tiles_everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.config.option.soft_tiles and not native.may_use_tiles():
            soft_tiles.use(patch)
        yield


@pytest.fixture(scope="module")
def tiles() -> Iterator[None]:
    """The machine's AMX, or that in software where there is AVX-512, within a module of tests."""
    with pytest.MonkeyPatch.context() as patch:
        if native.detect_level() == "v4" and not native.may_use_tiles():
            soft_tiles.use(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def strict_bounds() -> Iterator[None]:
    Bounds.strict = True
    yield
    Bounds.strict = False


def _said(name: str, otherwise: int) -> int:
    """A seed of the environment, or another; printed, which a failure shows."""
    seed = int(os.environ.get(name) or otherwise)
    print(f"{name}={seed}")
    return seed


@pytest.fixture
def rng() -> np.random.Generator:
    """For random data: fresh in each run."""
    return np.random.default_rng(_said("STAGEFUSE_SEED", secrets.randbits(32)))


@pytest.fixture
def program_seed(request: pytest.FixtureRequest) -> int:
    """For random programs, graphs and texts: the test's own, and with `--fuzz` a fresh one."""
    own = zlib.crc32(request.node.nodeid.encode())
    fresh = request.config.option.fuzz is not None
    return _said("STAGEFUSE_PROGRAM", secrets.randbits(32) if fresh else own)


@pytest.fixture
def chance(program_seed: int) -> random.Random:
    """Chooses what `program_seed` stands for."""
    return random.Random(program_seed)
