"""Teacher forcing over HTTP: what a given continuation costs, token by token, through decoding.

`sparseserve eval` serves with `--logits-processors sparseserve.plugin.forcing:ForcedTokens`. vLLM takes raw
log-probabilities before it asks logits processors, so those of the forced tokens are the model's own. A grammar
(structured outputs) would not do: its mask comes first. For model runner V1, which eval asks for;
V2 takes logits processors of another kind.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.logits_process import LogitsProcessor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "forced_tokens"  # key of a request's `vllm_xargs`: token ids, to be said in this order


class ForcedTokens(AdapterLogitsProcessor):
    """Leaves a request that names forced tokens no other choice."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> LogitsProcessor | None:
        forced = (params.extra_args or {}).get(FORCED)
        return None if forced is None else lambda said, logits: _only(logits, forced[min(len(said), len(forced) - 1)])


def _only(logits: Tensor, token: int) -> Tensor:
    """Logits [V] that allow one token."""
    return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor([token], device=logits.device), 0)
