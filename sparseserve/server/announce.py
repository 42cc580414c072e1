"""What a server tells its supervisor."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from sparseserve import environment


def announce_serving() -> None:
    """Tell the supervisor, if there is one, that from now on a stop may cut answers."""
    if supervisor := os.environ.get(environment.SUPERVISOR):
        with suppress(ProcessLookupError):
            os.kill(int(supervisor), signal.SIGUSR1)
