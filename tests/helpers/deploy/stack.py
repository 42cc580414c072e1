"""The services of deploy/compose.yaml as processes of this machine: their commands and what they mount, elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sparseserve.server.launch.process import free_port
from sparseserve.testing.waiting import wait_until
from tests.helpers.deploy.compose import SERVICES, VARIABLE, mounts

KEY = "sk-of-the-test"  # for everything that must be given
SBIN = "/usr/sbin:/usr/local/sbin"  # where Debian has nginx
PATIENCE = 240.0  # seconds; other tests may leave little of the machine


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def replaced(text: str, places: Mapping[str, str]) -> str:
    for here, there in places.items():
        text = text.replace(here, there)
    return text


def environment(name: str) -> dict[str, str]:
    """What compose sets for a service."""
    return {key: VARIABLE.sub(KEY, value) for key, value in SERVICES[name].get("environment", {}).items()}


def command(name: str, folder: Path, places: Mapping[str, str]) -> list[str]:
    """A service's command; what it mounts is copied to `folder`, where the command then looks for it."""
    folder.mkdir(exist_ok=True)
    copies = {}
    for target, path in mounts(SERVICES[name]).items():
        copies[target] = str(folder / path.name)
        (folder / path.name).write_text(replaced(path.read_text(), places))
    return [replaced(replaced(word, places), copies) for word in SERVICES[name]["command"]]


@contextmanager
def process(command: list[str], url: str, log: Path) -> Iterator[None]:
    """Run a command until the end of the block, which begins once `url` answers with 200."""
    path = f"{os.environ['PATH']}:{SBIN}"
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PATH": path})
        try:
            _wait_for_answer(url, child, log)
            yield
        finally:
            child.terminate()
            child.wait(30)


def _wait_for_answer(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    def silent() -> str:
        return f"no answer from {url}:\n{log.read_text()[-2000:]}"

    def answers() -> bool:
        assert child.poll() is None, silent()
        urllib.request.urlopen(url, timeout=5).close()
        return True

    wait_until(answers, silent, timeout=PATIENCE, not_yet=(OSError,))


def without_compiler(folder: Path) -> str:
    """A PATH as in the image of Dockerfile.cpu: of what vLLM may call, all but compilers."""
    folder.mkdir()
    for name in ("lscpu", "uname", "sh"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return str(folder)
