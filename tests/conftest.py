"""In tests a bound that the verifiers can neither prove nor break is a failure."""

from collections.abc import Iterator

import pytest

from stagefuse.compiler.bounds import Bounds


@pytest.fixture(autouse=True, scope="session")
def strict_bounds() -> Iterator[None]:
    Bounds.strict = True
    yield
    Bounds.strict = False
