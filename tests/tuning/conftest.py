import pytest

from tests.helpers.made_up import Lab


@pytest.fixture
def lab() -> Lab:
    return Lab()
