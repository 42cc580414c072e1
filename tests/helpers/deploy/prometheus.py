"""A real Prometheus with the project's own configuration, pointed at one server and hurried up."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from sparseserve.server.launch.process import free_port
from tests.helpers.deploy.observability import FOLDER

INTERVAL = "3s"  # longer than a busy server waits for its workers
PATIENCE = 240.0  # seconds; other tests may leave little of the machine


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
        deadline = time.monotonic() + PATIENCE
        while not self.values(expression):
            assert time.monotonic() < deadline, f"still nothing: {expression}"
            time.sleep(0.3)


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` (host:port) and evaluates the rules much more often than in production."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'storage'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(f"http://{address}", process)
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError("Prometheus did not start, see prometheus.log")
