"""The app that the tests of the front share."""

from collections.abc import Callable

import pytest
from front_app import Front, make_front


@pytest.fixture
def front() -> Callable[..., Front]:
    """Makes an app behind FrontEndpoint."""
    return make_front
