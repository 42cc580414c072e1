"""Nine laws and the poison test, for every policy. A new policy joins by one line in CASES."""

from __future__ import annotations

import pytest

from sparseserve.types import Role
from tests.helpers.contract import CASES, MODEL
from tests.helpers.laws import LAWS, Data

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("law", LAWS)
def test_law(law: str, name: str, data: Data) -> None:
    LAWS[law](CASES[name], data)


def test_reuse_layers_attend_to_the_latest_selection() -> None:
    roles = [plan.role for plan in CASES["tidal"].plans(MODEL)]
    assert roles == [Role.DENSE, Role.SELECT, Role.REUSE, Role.SELECT, Role.REUSE]
