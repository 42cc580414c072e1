import pytest
from made_up import Lab


@pytest.fixture
def lab() -> Lab:
    return Lab()
