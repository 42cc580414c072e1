"""Exit codes of a supervised server, with small stand-ins for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseserve.server.launch.supervise import SERVER_ENDED, START_GRACE
from sparseserve.testing.waiting import PATIENCE, wait_until

PRELUDE = (
    "import os, pathlib, signal, subprocess, sys, time\n"
    "from sparseserve.server.launch.supervise import announce_serving, stop_with_parent\n"
)
READY = "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
SUPERVISE = (
    "import sys; from sparseserve.server.launch import supervise as module; module.START_GRACE = int(sys.argv[1])\n"
    "sys.exit(module.supervise(sys.argv[2:]))"
)
HEALTHY = (
    "import sys, http.server as http\n"
    "class Handler(http.BaseHTTPRequestHandler):\n"
    "    def do_GET(self): self.send_response(200); self.end_headers()\n"
    "http.HTTPServer(('127.0.0.1', int(sys.argv[-1])), Handler).serve_forever()"
)
Start = Callable[..., "tuple[subprocess.Popen[bytes], int]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Supervise a Python program; returns the supervisor and the program's process id once it is ready."""

    def run(program: str, grace: int = START_GRACE) -> tuple[subprocess.Popen[bytes], int]:
        pid = tmp_path / "pid"
        child = [sys.executable, "-c", PRELUDE + program, str(pid)]
        supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(grace), *child])
        wait_until(lambda: pid.exists() and pid.read_text() != "")
        return supervisor, int(pid.read_text())

    return run


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody collects does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("code", [0, 2, SERVER_ENDED])
def test_the_exit_code_of_the_server_is_ours(start: Start, code: int) -> None:
    supervisor, _ = start(READY + f"sys.exit({code})")
    assert supervisor.wait(PATIENCE) == code


def test_a_killed_server_is_a_failure(start: Start) -> None:
    supervisor, server = start(READY + "time.sleep(600)")
    os.kill(server, signal.SIGKILL)
    assert supervisor.wait(PATIENCE) == 128 + signal.SIGKILL


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("code", [0, SERVER_ENDED])
def test_a_stop_is_told_as_sigterm_and_no_failure(start: Start, stop: signal.Signals, code: int) -> None:
    handler = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))\n"
    supervisor, server = start(handler + READY + "time.sleep(600)")
    supervisor.send_signal(stop)
    assert supervisor.wait(PATIENCE) == 0
    assert not alive(server)


DRAINS = "signal.signal(signal.SIGTERM, lambda *_: print('draining', file=open(sys.argv[1] + 'd', 'w'), flush=True))\n"


def test_a_second_stop_ends_a_server_that_still_drains(start: Start) -> None:
    """Also where a second API server begins to serve meanwhile."""
    begins = "signal.pause(); announce_serving(); time.sleep(600)"
    supervisor, server = start(DRAINS + "announce_serving()\n" + READY + begins)
    draining = Path(f"{_command(server)[-1]}d")
    supervisor.send_signal(signal.SIGINT)
    wait_until(draining.exists)
    with pytest.raises(subprocess.TimeoutExpired):
        supervisor.wait(START_GRACE + 1)
    assert alive(server)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(PATIENCE) == 0
    assert not alive(server)


def test_a_stop_is_not_swallowed_by_a_server_that_starts(start: Start) -> None:
    engine = "engine = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    ready = "pathlib.Path(sys.argv[1]).write_text(str(engine.pid))\n"
    supervisor, engine_pid = start(DRAINS + engine + ready + "while True: time.sleep(600)")
    supervisor.send_signal(signal.SIGTERM)
    wait_until(lambda: not alive(engine_pid))  # which follows the signal
    assert supervisor.poll() is None
    assert supervisor.wait(PATIENCE) == 0


def test_a_server_that_swallowed_a_stop_does_not_serve(start: Start) -> None:
    supervisor, server = start(DRAINS + READY + "signal.pause(); announce_serving(); time.sleep(600)", grace=600)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(PATIENCE) == 0
    assert not alive(server)


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def test_nothing_outlives_a_dead_server(start: Start) -> None:
    """An engine whose server is gone would hold its memory for ever."""
    engine = "engine = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    ready = "pathlib.Path(sys.argv[1]).write_text(str(engine.pid))\n"
    supervisor, engine_pid = start(engine + ready + "sys.exit(1)")
    assert supervisor.wait(PATIENCE) == 1
    wait_until(lambda: not alive(engine_pid))


def test_the_server_stops_when_its_supervisor_is_killed(start: Start) -> None:
    supervisor, server = start("stop_with_parent()\n" + READY + "time.sleep(600)")
    supervisor.kill()
    supervisor.wait(PATIENCE)
    wait_until(lambda: not alive(server))


def test_a_server_ends_with_the_process_that_started_it() -> None:
    """A killed evaluation leaves no server behind."""
    program = "import pathlib, sys, time; from sparseserve.server.launch.process import running\n"
    program += "with running([sys.executable, '-c', sys.argv[1]], pathlib.Path('/dev/null')) as server:\n"
    program += "    print(server.process.pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", program, HEALTHY], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert alive(server)
    parent.kill()
    wait_until(lambda: not alive(server))
    parent.wait(PATIENCE)
