"""`vllm bench serve` for wheels whose `vllm` command cannot start, and several runs without importing vLLM again.

With arguments, one run: `python -m loadtest.vllm_bench ARGUMENTS OF vllm bench serve`. Without, each line of stdin is
a JSON list of arguments, answered by a line on stdout: what went wrong, or nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser


def bench(arguments: Sequence[str]) -> None:
    """One run of `vllm bench serve`."""
    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args(list(arguments)))


def serve_lines() -> None:
    """Run what stdin asks for; vLLM's own output goes to stderr."""
    answers = sys.stdout
    for line in sys.stdin:
        problem = ""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                bench(json.loads(line))
        except (Exception, SystemExit) as error:  # of any kind: the asker decides
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(problem, file=answers, flush=True)


if __name__ == "__main__":
    bench(sys.argv[1:]) if sys.argv[1:] else serve_lines()
