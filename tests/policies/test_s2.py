"""S2: the pattern against its formula, block by block."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sparseserve.decode.step import StepBuffers
from sparseserve.errors import ArtifactError
from sparseserve.model import ModelShape
from sparseserve.policies import S2
from sparseserve.testing.bed import token_mask
from sparseserve.types import HeadShape, PageTable, Role
from tests.helpers.artifact_files import head_map

PAGE = 128
LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, 640, 1000, 1024]


def shape(kv_heads: int, group: int = 1, rank: int = 0, ranks: int = 1) -> ModelShape:
    return ModelShape("m", 4, HeadShape(kv_heads, group, 32), max_len=1024, page_size=PAGE, rank=rank, ranks=ranks)


def attended(policy: S2, model: ModelShape, lengths: list[int] = LENGTHS) -> Tensor:
    """What the first layer attends to, [B, Hs, max_len] bool."""
    plans = policy.plans(model)
    buffers = StepBuffers(policy, plans, model.heads, len(lengths), model.max_len)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    step = buffers.step(PageTable(torch.zeros(len(lengths), model.max_len // PAGE, dtype=torch.int32), seq_lens))
    policy.prepare(step, model)
    return token_mask(step.attends_to(plans[0]), seq_lens, model.max_len)


def formula(policy: S2, heads: int, length: int) -> Tensor:
    """The last row of the prefill mask, [heads, max_len] bool, written out token by token."""
    mask = torch.zeros(heads, 1024, dtype=torch.bool)
    step = 0 if policy.homo_heads else max(1, int(policy.stride / heads))
    current = (length - 1) // policy.block_tokens
    for head, token in product(range(heads), range(length)):
        block = token // policy.block_tokens
        local = current - block < policy.local_blocks
        distant = (block + head * step + policy.offset_blocks) % policy.stride == 0
        mask[head, token] = local or distant or head >= heads - policy.dense_heads
    return mask


@pytest.mark.parametrize(
    ("block_tokens", "local_blocks", "stride", "heads"),
    [(64, 2, 3, 2), (64, 1, 8, 2), (32, 4, 2, 8), (128, 2, 4, 4), (16, 5, 7, 3), (64, 16, 8, 1)],
)
@pytest.mark.parametrize("extra", [{}, {"homo_heads": True}, {"offset_blocks": 1}, {"dense_heads": 1}], ids=str)
def test_the_pattern_is_its_formula(
    block_tokens: Literal[16, 32, 64, 128], local_blocks: int, stride: int, heads: int, extra: dict[str, Any]
) -> None:
    policy = S2(block_tokens=block_tokens, local_blocks=local_blocks, stride=stride, **extra)
    mask = attended(policy, shape(heads))
    for row, length in enumerate(LENGTHS):
        assert torch.equal(mask[row], formula(policy, heads, length))


def test_query_heads_slide_on_their_own() -> None:
    policy = S2(local_blocks=1, stride=8, scope="query_head")
    mask = attended(policy, shape(kv_heads=2, group=4), [1024])[0]
    assert torch.equal(mask, formula(policy, 8, 1024))
    assert len({tuple(head.tolist()) for head in mask}) == 8


def test_a_block_that_was_dropped_is_never_needed_again() -> None:
    lengths = [*range(1, 1025)]
    mask = attended(S2(local_blocks=2, stride=3), shape(2), lengths)  # [N, H, T]
    there = torch.arange(1024) < torch.tensor(lengths)[:, None, None]
    dropped = (there & ~mask).int()
    assert (dropped.diff(dim=0) >= 0).all()
    assert dropped.any()


def test_the_heads_together_see_everything() -> None:
    mask = attended(S2(local_blocks=1, stride=4), shape(4), [1024])[0]
    assert mask.any(0).all()
    assert not mask.all(1).any()


def test_homo_heads_see_the_same_and_dense_heads_all() -> None:
    homo = attended(S2(local_blocks=1, stride=4, homo_heads=True), shape(4), [1024])[0]
    assert (homo == homo[0]).all()
    some_dense = attended(S2(local_blocks=1, stride=4, dense_heads=2), shape(4), [1024])[0]
    assert some_dense.all(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("extra", [{}, {"dense_heads": 3}, {"scope": "query_head"}], ids=str)
def test_ranks_together_are_the_whole_model(extra: dict[str, Any]) -> None:
    policy = S2(local_blocks=2, stride=4, **extra)
    parts = [attended(policy, shape(2, 2, rank, ranks=2)) for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1), attended(policy, shape(4, 2)))


def test_every_nth_layer_is_dense() -> None:
    roles = [plan.role for plan in S2(dense_every=2).plans(shape(2))]
    assert roles == [Role.WINDOW, Role.DENSE, Role.WINDOW, Role.DENSE]
    assert Role.DENSE not in [plan.role for plan in S2().plans(shape(2))]


@pytest.mark.parametrize("extra", [{}, {"homo_heads": True}, {"offset_blocks": 3}, {"dense_heads": 1}], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_expected_tokens_are_the_mean_over_heads(heads: int, extra: dict[str, Any]) -> None:
    policy, model = S2(local_blocks=2, stride=4, min_tokens=0, **extra), shape(heads)
    for length in (129, 192, 640, 777, 1024):
        mean = attended(policy, model, [length]).sum(-1).double().mean().item()
        assert policy.expected_tokens(policy.plans(model)[0], length) == pytest.approx(mean)


@pytest.fixture
def phi_3_small(tmp_path: Path) -> str:
    config = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "blocksparse_block_size": 64,
        "blocksparse_num_local_blocks": 12,
        "blocksparse_vert_stride": 6,
        "blocksparse_homo_head_pattern": False,
        "blocksparse_triton_kernel_block_size": 64,
        "dense_attention_every_n_layers": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "config.json")


def test_a_models_own_pattern_is_taken(phi_3_small: str) -> None:
    policy = S2(artifact=phi_3_small)
    assert (policy.local_blocks, policy.stride, policy.dense_every) == (12, 6, 2)
    assert (policy.scope, policy.offset_blocks) == ("query_head", 1)  # as its modeling code
    assert S2(artifact=phi_3_small, stride=8).stride == 8
    assert S2.model_validate(policy.model_dump(mode="json")) == policy


def test_the_pattern_of_another_model_is_refused(phi_3_small: str) -> None:
    with pytest.raises(ArtifactError, match="layers = 32.*m has"):
        S2(artifact=phi_3_small).plans(shape(2))


def test_other_artifacts_are_refused() -> None:
    with pytest.raises(ArtifactError, match="kind s2.*--policy retrieval"):
        S2(artifact=head_map([[1, 0]]))
