"""The dashboards are what their panels say, and Grafana can place and fill them."""

from typing import Any

import pytest

from tests.helpers.deploy.observability import DASHBOARDS, names, panels

EACH = pytest.mark.parametrize("name", DASHBOARDS)


def test_uids_are_unique() -> None:
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS) == 2


@EACH
def test_panels_have_places_of_their_own(name: str) -> None:
    placed = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in placed}) == len(placed)
    cells = [cell for panel in placed for cell in _cells(panel["gridPos"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@EACH
def test_panels_say_which_metrics_they_show(name: str) -> None:
    for panel in panels(DASHBOARDS[name]):
        shown = set.union(*(names(target["expr"]) for target in panel["targets"]))
        assert shown
        for metric in shown:
            family = metric.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
            assert family in panel["description"], panel["title"]


@EACH
def test_every_query_goes_to_the_chosen_servers(name: str) -> None:
    chosen = {variable["name"] for variable in DASHBOARDS[name]["templating"]["list"]}
    assert chosen >= {"datasource", "job", "instance"}
    for panel in panels(DASHBOARDS[name]):
        for target in panel["targets"]:
            metrics = len(names(target["expr"]))
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count('instance=~"$instance"') == target["expr"].count('job=~"$job"') >= metrics


def _cells(place: dict[str, Any]) -> list[tuple[int, int]]:
    columns, rows = (range(place[start], place[start] + place[size]) for start, size in (("x", "w"), ("y", "h")))
    return [(x, y) for x in columns for y in rows]
