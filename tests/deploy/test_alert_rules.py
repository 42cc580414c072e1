"""promtool accepts the rules and their unit tests; every alert has both kinds of tests and a section in the runbook."""

import re
import shutil
import subprocess
from collections import defaultdict

import pytest
import yaml

from tests.helpers.deploy.observability import ALERTS, DASHBOARDS, FOLDER
from tests.helpers.paths import DEPLOY

SECTIONS = re.split(r"^## ", (DEPLOY / "RUNBOOK.md").read_text(), flags=re.MULTILINE)[1:]

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed"
)


@promtool
@pytest.mark.parametrize(
    "command", ["check rules rules.yml", "check config prometheus.yml", "test rules rules_test.yml"]
)
def test_promtool_accepts(command: str) -> None:
    check = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True)
    assert check.returncode == 0 and "SUCCESS" in check.stdout, check.stdout + check.stderr


def test_every_alert_is_seen_firing_and_silent() -> None:
    seen = defaultdict(set)
    for group in yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]:
        for test in group.get("alert_rule_test", []):
            seen[test["alertname"]].add("exp_alerts" in test)
    assert seen == dict.fromkeys(ALERTS, {True, False})


def test_every_alert_says_what_how_bad_and_where_to_read_on() -> None:
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info") and rule["for"]
        assert {"summary", "description"} < set(rule["annotations"])
        assert rule["annotations"]["runbook_url"] == f"deploy/RUNBOOK.md#{name.lower()}"


def test_the_runbook_has_a_section_for_every_alert() -> None:
    assert [section.split("\n", 1)[0] for section in SECTIONS] == list(ALERTS)
    assert all(part in section for section in SECTIONS for part in ("**Means**", "**Look at**", "**Do**"))


def test_the_runbook_looks_at_panels_that_exist() -> None:
    titles = {panel["title"] for dashboard in DASHBOARDS.values() for panel in dashboard["panels"]}
    looks = [section.partition("**Look at**")[2].partition("**Do**")[0] for section in SECTIONS]
    assert {title for look in looks for title in re.findall('"([^"]+)"', look)} <= titles
