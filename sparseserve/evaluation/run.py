"""One server after another, each asked what is still missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from subprocess import TimeoutExpired
from tempfile import TemporaryDirectory
from typing import Any

from openai import APIStatusError, OpenAIError

from sparseserve.errors import SparseServeError
from sparseserve.evaluation.client import Client
from sparseserve.evaluation.evaluation import Evaluation, Setting
from sparseserve.evaluation.journal import journal
from sparseserve.evaluation.measure import Examiner
from sparseserve.evaluation.pieces import pieces
from sparseserve.evaluation.report import assemble, versions
from sparseserve.evaluation.results import Results
from sparseserve.server.launch.process import SERVE, Server, running
from sparseserve.vllm_version import V1_RUNNER

FORCING = ["--logits-processors", "sparseserve.plugin.forcing:ForcedTokens"]
STARTUP_TIMEOUT = 3600.0  # seconds; large weights take their time from a network
END = 10.0  # seconds that a dying server may take to be gone
LAST_WORDS = 3000  # characters of a log

Progress = Callable[[int, int, str], None]  # pieces done, pieces in all, the one at work
Serve = Callable[[Evaluation, Setting], AbstractContextManager[Server]]


@contextmanager
def serve(request: Evaluation, setting: Setting) -> Iterator[Server]:
    """A server under a setting; SparseServeError with the end of its log when it does not start."""
    command, env = [*SERVE, request.model, *setting.flags(), *request.vllm], {}
    if request.text is not None:
        command, env = [*command, *FORCING], V1_RUNNER
    with TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            server = stack.enter_context(running(command, Path(folder) / "server.log", env, STARTUP_TIMEOUT))
        except RuntimeError as error:
            raise SparseServeError(f"{setting}: {error}") from None
        yield server


def evaluate(
    request: Evaluation,
    output: Path | None = None,
    progress: Progress = lambda done, total, piece: None,
    serve: Serve = serve,
) -> Results:
    """Measure all that is asked for; the results are not written, for the caller may only want to read them.

    Beside `output` (RESULTS.json) grows RESULTS.partial.jsonl, with which a killed run goes on where it was. Raises
    ConfigError for what cannot be asked, SparseServeError for a server that does not start, refuses or dies.
    """
    request.check()
    partial = None if output is None else partial_file(output)
    examiner = Examiner(request)
    with journal(partial, _asked(request)) as found:
        every = list(pieces(request))
        missing = [(done, piece) for done, piece in enumerate(every) if piece.key not in found]
        for setting, group in groupby(missing, key=lambda one: one[1].served):
            mine = list(group)
            progress(mine[0][0], len(every), f"{setting}: starting its server")
            with serve(request, setting) as server:
                with _blaming(server, setting, partial):
                    client = Client(server)
                    examiner.check(client)
                for done, piece in mine:
                    progress(done, len(every), str(piece))
                    with _blaming(server, piece, partial):
                        found.add(piece.key, examiner.measure(client, piece))
        return assemble(request, found, "RESULTS.json" if output is None else str(output))


def partial_file(output: Path) -> Path:
    """Where findings are kept until all are there."""
    return output.with_suffix(".partial.jsonl")


def _asked(request: Evaluation) -> dict[str, Any]:
    """What findings depend on beside their setting and its artifact: only those of the same may be put together."""
    text, config = request.read_text(), Path(request.model) / "config.json"
    return {
        "versions": versions(),
        **request.model_dump(mode="json", exclude={"settings", "recall"}),
        "text_sha256": text and hashlib.sha256(text.encode()).hexdigest(),
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
    }


@contextmanager
def _blaming(server: Server, at: object, partial: Path | None) -> Iterator[None]:
    try:
        yield
    except (OpenAIError, OSError) as error:
        raise _failed(server, at, error, partial) from error


def _failed(server: Server, at: object, error: Exception, partial: Path | None) -> SparseServeError:
    """What happened to the server, at what, and what is kept."""
    kept = f"What was found before is kept in {partial}; the same command goes on there." if partial else ""
    if isinstance(error, APIStatusError) and error.status_code < 500:
        return SparseServeError(f"{at}: the server refuses: {error}", kept)
    try:
        happened = f"the server ended with exit code {server.process.wait(END)}"
    except TimeoutExpired:
        happened = f"the server does not answer ({error!r})"
    return SparseServeError(f"{at}: {happened}. {kept} Its last words:\n{server.log.read_text()[-LAST_WORDS:]}")
