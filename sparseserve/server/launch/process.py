"""A server as a child process: for the demo, the benchmark and the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from sparseserve.server.launch.supervise import stop_with_parent

STARTUP_TIMEOUT = 240.0  # seconds, of a small model
SERVE = [sys.executable, "-m", "sparseserve", "serve"]


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> str:
        """The body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            body: bytes = response.read()
        return body.decode()

    def samples(self) -> list[Sample]:
        """What /metrics says."""
        families = text_string_to_metric_families(self.get("/metrics"))
        return [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry `labels`."""
        return sum(
            sample.value for sample in self.samples() if sample.name == name and labels.items() <= sample.labels.items()
        )

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


@contextmanager
def running(
    command: Sequence[str], log: Path, env: dict[str, str] | None = None, startup_timeout: float = STARTUP_TIMEOUT
) -> Iterator[Server]:
    """Start `command` with a free `--port`, wait until it is healthy, stop it at the end, also at our own.

    RuntimeError with the end of its log when it ends before, or is not healthy after so many seconds.
    """
    port = free_port()
    full = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            full,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}),
            process_group=0,
            preexec_fn=stop_with_parent,
        )
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            _wait(server, startup_timeout)
            yield server
        finally:
            server.stop()


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(server: Server, timeout: float) -> None:
    begun = time.monotonic()
    while (waited := time.monotonic() - begun) < timeout and server.process.poll() is None:
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(0.5)
    code = server.process.poll()
    happened = "the server did not start" if code is None else f"the server ended with exit code {code}"
    raise RuntimeError(f"{happened} after {waited:.0f} s:\n{server.log.read_text()[-4000:]}")
