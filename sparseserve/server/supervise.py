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

SERVER_ENDED = 1  # exit code of a server that stops serving; only the supervisor knows whether it was told to
PR_SET_PDEATHSIG = 1


def supervise(command: Sequence[str]) -> int:
    """Run `command`; 0 once it was told to stop, else its own exit code.

    The first SIGTERM or SIGINT tells it to finish what runs (SIGTERM), the second ends it at once.
    """
    stopping = False
    # Its own session: Ctrl+C reaches it once, through us, and what it leaves behind can be found.
    child = subprocess.Popen(command, start_new_session=True)

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            os.killpg(child.pid, signal.SIGKILL)
        stopping = True
        child.send_signal(signal.SIGTERM)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    code = child.wait()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if stopping:
        return 0
    if code == SERVER_ENDED:
        print("sparseserve: the server ended without being told to, see its log above", file=sys.stderr)
    return code if code >= 0 else 128 - code


def stop_with_parent() -> None:
    """Have Linux send us SIGTERM when the supervisor dies, however it dies."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
