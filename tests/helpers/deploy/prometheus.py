"""A real Prometheus with the project's own configuration, pointed at one server and hurried up."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from sparseserve.testing.waiting import wait_until
from tests.helpers.deploy.observability import FOLDER
from tests.helpers.deploy.stack import PATIENCE, free_address, process

INTERVAL = "3s"  # longer than a busy server waits for its workers


@dataclass(frozen=True, slots=True)
class Prometheus:
    """Its HTTP API."""

    url: str

    def api(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer; HTTPError where the query is wrong."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as response:
            return json.load(response)["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression is now; undefined numbers are left out."""
        found = [float(sample["value"][1]) for sample in self.api("query", query=expression)["result"]]
        return [value for value in found if value == value]

    def wait_for(self, expression: str) -> None:
        """Until an expression gives something."""
        wait_until(lambda: self.values(expression), lambda: f"nothing for {expression}", timeout=PATIENCE)


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` (host:port) and evaluates the rules much more often than in production."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = free_address()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'storage'}",
        f"--web.listen-address={address}",
    ]
    with process(command, f"http://{address}/-/ready", folder / "prometheus.log"):
        yield Prometheus(f"http://{address}")
