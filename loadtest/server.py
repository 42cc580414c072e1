"""Servers as a load test sees them: a URL, a served model, and a process where we started it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from loadtest.prompts import Tokens, source
from loadtest.scenario import LoadTestError
from loadtest.setting import PLUGIN_FREE, Setting

START, STOP = 3600.0, 60.0  # seconds; large models load and compile for long
WORKERS = ("VLLM::Worker", "VLLM::EngineCore")  # process titles; on one GPU the engine core works itself
SERVED_NAME = "loadtest"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    url: str
    model: str  # the name that requests give
    command: str  # starts it again
    process: subprocess.Popen[bytes] | None = None  # of a server that we started
    log: Path | None = None

    def client(self, timeout: float = 60.0) -> httpx.Client:
        """For single requests, with the key that `vllm bench serve` takes, too."""
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        encrypted = self.url.startswith("https")  # certificates take longer to load than most requests
        return httpx.Client(base_url=self.url, timeout=timeout, headers=headers, verify=encrypted)

    def status(self, path: str) -> int:
        """HTTP status of a GET; 0 where nothing listens."""
        with self.client(5.0) as client:
            try:
                return client.get(path).status_code
            except httpx.TransportError:
                return 0

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer of a POST; LoadTestError for any other."""
        try:
            with self.client() as client:
                answer = client.post(path, json={"model": self.model} | body)
        except httpx.HTTPError as error:
            raise LoadTestError(f"{self.url}{path} does not answer: {error}") from None
        if answer.is_error:
            raise LoadTestError(f"{self.url}{path} answers {answer.status_code}: {answer.text[:500]}")
        return answer.json()

    def tokens(self, text: Path | None) -> Tokens:
        """What prompts out of `text` must know of the tokenizer."""
        sample = source(text)[:20000]
        size = len(sample) / self.post("/tokenize", {"prompt": sample})["count"]
        with_space, ended = (self._ids(words) for words in ("is 7", "is "))
        return Tokens(size, with_space[:-1] == ended)

    def processes(self) -> list[psutil.Process]:
        """The server's process and all that it started."""
        if self.process is None:
            raise LoadTestError("the processes of a server at --url are not ours to look at")
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def worker(self) -> psutil.Process:
        """The process that runs the model."""
        titles = {process: _title(process) for process in self.processes()}
        for wanted in WORKERS:
            for process, title in titles.items():
                if title.startswith(wanted):
                    return process
        raise LoadTestError(f"{self.url} has no worker process")

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None where it still runs after so long."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _ids(self, words: str) -> list[int]:
        ids: list[int] = self.post("/tokenize", {"prompt": words, "add_special_tokens": False})["tokens"]
        return ids


def command(setting: Setting, model: str, flags: Sequence[str]) -> list[str]:
    """Serves `model` under `setting`; vLLM's own server where it is plugin-free."""
    if setting.policy == PLUGIN_FREE:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags]
    return [sys.executable, "-m", "sparseserve", "serve", model, *_policy_flags(setting), *flags]


def check(setting: Setting, model: str, flags: Sequence[str]) -> None:
    """Ask `sparseserve explain`, before hours of work; LoadTestError with its message where it refuses a setting."""
    if setting.policy == PLUGIN_FREE:
        return
    words = [sys.executable, "-m", "sparseserve", "explain", model, *_policy_flags(setting), *flags]
    answer = subprocess.run(words, capture_output=True, text=True)
    if answer.returncode:
        raise LoadTestError(f"{setting}: {_said(answer.stderr) or answer.stderr[-2000:]}")


@contextmanager
def serving(setting: Setting, model: str, flags: Sequence[str], log: Path) -> Iterator[Server]:
    """A server of its own for `setting`, until the end; LoadTestError where it does not start."""
    server = start(setting, model, flags, log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        stop(server)


def start(setting: Setting, model: str, flags: Sequence[str], log: Path) -> Server:
    """Start a server, without waiting for it."""
    port = _free_port()
    words = [*command(setting, model, flags), "--served-model-name", SERVED_NAME]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    line = shlex.join(["python", *words[1:]])
    env = os.environ | ({"VLLM_PLUGINS": ""} if setting.policy == PLUGIN_FREE else {})
    with log.open("wb") as output:
        output.write(f"{line}\n".encode())
        output.flush()
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=env, process_group=0)
    return Server(f"http://127.0.0.1:{port}", SERVED_NAME, line, process, log)


def stop(server: Server) -> None:
    """End a server and whatever it left behind."""
    assert server.process is not None
    with suppress(psutil.NoSuchProcess):
        family = server.processes()
        server.process.terminate()
        psutil.wait_procs(family, STOP)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    server.process.wait()


@contextmanager
def running_at(url: str, alias: str) -> Iterator[Server]:
    """A server that runs already; `alias` is what its model's name ends with, as in NAME@dense."""
    plain = Server(url.rstrip("/"), "", f"(the server at {url})")
    try:
        with plain.client() as client:
            name = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    except httpx.HTTPError as error:
        raise LoadTestError(f"--url {url} is no OpenAI-compatible server: {error}") from None
    yield Server(plain.url, name if alias == "default" else f"{name}@{alias}", plain.command)


def _policy_flags(setting: Setting) -> list[str]:
    return ["--policy", setting.policy, *(word for pair in setting.pairs for word in ("--set", pair))]


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and server.process is not None and server.process.poll() is None:
        if server.status("/health") == httpx.codes.OK:
            return
        time.sleep(0.5)
    assert server.process is not None and server.log is not None
    code = server.process.poll()
    ended = f"/health was not 200 within {START:.0f} s" if code is None else f"exit code {code}"
    said = _said(server.log.read_text(errors="replace"))
    raise LoadTestError(f"the server did not start ({ended}){said and ', ' + said}; its log is {server.log}")


def _said(output: str) -> str:
    """The last that sparseserve itself says; other libraries may write on the same line."""
    said: list[str] = re.findall(r"sparseserve: .*", output)
    return said[-1] if said else ""


def _title(process: psutil.Process) -> str:
    """Its command line, which vLLM's processes replace with their titles; empty where it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
