"""Run the server as a child to give its end the right exit code: vLLM exits with 0 also when its engine died."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from sparseserve import environment

SERVER_ENDED = 1  # exit code of a server that stops serving; only the supervisor knows whether it was told to
START_GRACE = 5  # seconds to end for a server that was told to before it serves
PR_SET_PDEATHSIG = 1


def supervise(command: Sequence[str]) -> int:
    """Run `command`; 0 once it was told to stop, else its own exit code.

    The first SIGTERM or SIGINT tells it to finish what runs (SIGTERM), the second ends it at once. Until it serves,
    nothing runs, and vLLM may swallow the signal: all of its processes get it, and START_GRACE to follow it.
    """
    serving = stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            return end()
        stopping = True
        if serving:
            child.send_signal(signal.SIGTERM)
        else:
            os.killpg(child.pid, signal.SIGTERM)
            signal.alarm(START_GRACE)

    def serve(_: int, __: FrameType | None) -> None:
        nonlocal serving
        if stopping and not serving:
            end()
        serving = True

    def end(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    signal.signal(signal.SIGUSR1, serve)
    # Its own group: Ctrl+C reaches it once, through us, and what it leaves behind can be found. No session: Linux would
    # share the processors out between sessions, and starve whoever asks the server beside it.
    child = subprocess.Popen(command, process_group=0, env=os.environ | {environment.SUPERVISOR: str(os.getpid())})
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    signal.signal(signal.SIGALRM, end)
    code = child.wait()
    end()
    if stopping:
        return 0
    if code == SERVER_ENDED:
        print("sparseserve: the server ended without being told to, see its log above", file=sys.stderr)
    return code if code >= 0 else 128 - code


def stop_with_parent() -> None:
    """Have Linux send us SIGTERM when the supervisor dies, however it dies."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
