"""lm-evaluation-harness asks the server, with a task on local data; nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseserve.server.process import Server

HERE = Path(__file__).parent / "harness"
pytest.importorskip("lm_eval", reason="pip install 'lm_eval[api]'; its 35 packages are not in deploy/cpu.lock")
pytestmark = pytest.mark.e2e


def test_the_harness_scores_local_data(model: Path, dense: Server, tmp_path: Path) -> None:
    settings = {
        "model": model,
        "base_url": f"{dense.url}/v1/completions",
        "tokenizer": model,
        "tokenized_requests": False,
    }
    arguments = ",".join(f"{key}={value}" for key, value in settings.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "pass_key", "--include_path", ".", "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=HERE, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["pass_key"]["exact_match,stripped"] == 1
