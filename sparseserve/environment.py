"""The environment variables that the project reads, writes or passes on to processes of its own."""

from __future__ import annotations

import os

from sparseserve.errors import ConfigError

POLICY = "SPARSESERVE_POLICY"  # a policy's name or file, for want of --policy
SET = "SPARSESERVE_SET_"  # before the name of a policy's key in capitals, for want of --set
PAGE = "SPARSESERVE_PAGE"  # 1: the API server has the page /sparsity
REQUEST_BYTES = "SPARSESERVE_MAX_REQUEST_BYTES"
SUPERVISOR = "SPARSESERVE_SUPERVISOR"  # the process to tell that the server serves
POISON = "SPARSESERVE_POISON_FREED_PAGES"  # 1: tests of head memory fill what was freed
PLUGINS = "VLLM_PLUGINS"  # vLLM's allow-list
PROMETHEUS, TEMPORARY = "PROMETHEUS_MULTIPROC_DIR", "TMPDIR"
PASSED_ON = (PLUGINS, PAGE, REQUEST_BYTES)  # from the launcher to the API server

DEFAULT_REQUEST_BYTES = 32 * 2**20


def max_request_bytes() -> int:
    """The cap on bodies, in bytes; ConfigError for what is no number of them."""
    text = os.environ.get(REQUEST_BYTES, str(DEFAULT_REQUEST_BYTES))
    if not text.isdecimal() or not int(text):
        raise ConfigError(REQUEST_BYTES, text, "a whole number of bytes from 1", remedy="unset it for 32 MiB")
    return int(text)
