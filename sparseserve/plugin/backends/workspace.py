"""The large memory of a step, where vLLM's profiling sees it."""

from __future__ import annotations

from functools import partial

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from sparseserve.decode.step import StepWorkspace
from sparseserve.errors import Problem, UnsupportedError
from sparseserve.policies import Policy
from sparseserve.types import HeadShape


def step_workspace(config: VllmConfig, policy: Policy, heads: HeadShape, device: torch.device) -> StepWorkspace:
    """The worker's one memory for steps of these sizes, a persistent resource of vLLM's workspace manager.

    Layers ask for it in vLLM's profiling run, so that the KV cache gets what is left; the builder asks again. Raises
    UnsupportedError when the device has too little.
    """
    rows, max_len = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
    allocate = partial(_allocate, policy, heads, rows, max_len, device)
    if not is_workspace_manager_initialized():
        return allocate()
    return current_workspace_manager().get_persistent_resource(("sparseserve", policy, heads, rows, max_len), allocate)


def _allocate(policy: Policy, heads: HeadShape, rows: int, max_len: int, device: torch.device) -> StepWorkspace:
    try:
        return StepWorkspace.allocate(policy, heads, rows, max_len, device)
    except torch.OutOfMemoryError as error:
        size = StepWorkspace.allocate(policy, heads, rows, max_len, torch.device("meta")).nbytes
        single = policy.scored_units(max_len) == max_len
        remedy = "give a smaller --max-num-seqs or --max-model-len" + ", or --set unit_tokens=32" * single
        allowed = f"fewer: steps of rows of up to {max_len} tokens take {size / 2**30:.2f} GiB under {policy.name}"
        raise UnsupportedError(Problem("--max-num-seqs", rows, allowed, remedy=remedy)) from error
