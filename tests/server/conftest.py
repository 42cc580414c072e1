"""The app that the tests of the front share."""

from collections.abc import Callable, Iterator

import pytest

from sparseserve.server.front.counters import CONFIGURED, DRAINING, REQUESTS
from tests.helpers.server.front_app import Front, make_front


@pytest.fixture
def front() -> Iterator[Callable[..., Front]]:
    """Makes an app behind FrontEndpoint; what it counted is forgotten, the registry is the whole process's."""
    yield make_front
    DRAINING.set(0)
    REQUESTS.clear()
    CONFIGURED.clear()
