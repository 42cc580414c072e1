"""An engine in one process, in a script that a test starts: JSON on stdin, JSON on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseserve.config import WORKERS, to_dict
from sparseserve.policies import Policy
from tests.helpers.paths import ROOT


def ask(script: str, model: Path | str, policy: Policy, engine: dict[str, Any], **asked: Any) -> tuple[Any, str]:
    """What the module `script` answers about an engine of these settings, and what it logs."""
    question = {"model": str(model), "policy": to_dict(policy), "engine": engine} | asked
    done = subprocess.run(
        [sys.executable, "-m", script], cwd=ROOT, input=json.dumps(question), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


def answer(main: Callable[[dict[str, Any]], Any]) -> None:
    """Run the script: `main` gets what was asked."""
    asked, out = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)  # what vLLM prints is not the answer
    os.write(out, json.dumps(main(asked)).encode())


def start(asked: dict[str, Any]) -> Any:
    """vLLM's LLM, whose scheduler and worker share this process; ranks are processes with cores of their own."""
    cores, ranks = [*map(str, sorted(os.sched_getaffinity(0)))], asked["engine"].get("tensor_parallel_size", 1)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(cores[rank::ranks]) for rank in range(ranks)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM

    config = {"sparseserve": asked["policy"]}
    return LLM(
        asked["model"], additional_config=config, worker_cls=WORKERS["cpu"], enforce_eager=True, **asked["engine"]
    )
