"""vLLM's cache tensor as views of it: where every number lies, and that none lies on another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseserve.decode.views import cpu_views, cuda_views, page_state
from sparseserve.types import PagedKV, PageState

M, H, P, D = 3, 2, 4, 8
PAGE, TAIL, START = H * P * 2 * D, 48, 8  # numbers of a page, behind it, and before the first one
WIDE = PAGE + TAIL
HEADS_FIRST, TOKENS_FIRST = (P * 2 * D, 2 * D), (2 * D, H * 2 * D)  # steps from head to head, and from token to token


def pool(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(START + M * WIDE, dtype=dtype)


def cache(memory: Tensor, steps: tuple[int, int] = HEADS_FIRST) -> Tensor:
    """The cache [M, H, P, 2D] as vLLM gives it, in wider pages of a larger pool."""
    return memory.as_strided((M, H, P, 2 * D), (WIDE, *steps, 1), START)


def written(view: Tensor, memory: Tensor) -> Tensor:
    """Where in the pool a write through a view lands."""
    memory.zero_()
    view.copy_(torch.arange(1, view.numel() + 1).view(view.shape))
    at = torch.empty(view.numel(), dtype=torch.int64)
    places = memory.nonzero().flatten()
    at[memory[places].long() - 1] = places
    return at.view(view.shape)


def test_on_the_cpu_a_head_has_its_keys_by_channel_and_then_its_values_by_token() -> None:
    memory = pool()
    kv = cpu_views(cache(memory))
    assert kv.key.shape == kv.value.shape == (M, H, P, D)
    keys, values = written(kv.key, memory), written(kv.value, memory)
    for page, head, token, channel in torch.cartesian_prod(*map(torch.arange, (M, H, P, D))).tolist():
        start = START + page * WIDE + head * P * 2 * D
        assert keys[page, head, token, channel] == start + channel * P + token
        assert values[page, head, token, channel] == start + P * D + token * D + channel


@pytest.mark.parametrize("steps", [HEADS_FIRST, TOKENS_FIRST])
def test_on_cuda_a_token_has_its_key_and_then_its_value(steps: tuple[int, int]) -> None:
    memory = pool()
    kv = cuda_views(cache(memory, steps))
    assert kv.key.shape == kv.value.shape == (M, H, P, D)
    keys, values = written(kv.key, memory), written(kv.value, memory)
    for page, head, token, channel in torch.cartesian_prod(*map(torch.arange, (M, H, P, D))).tolist():
        at = START + page * WIDE + head * steps[0] + token * steps[1] + channel
        assert (keys[page, head, token, channel], values[page, head, token, channel]) == (at, at + D)


@pytest.mark.parametrize("steps", [HEADS_FIRST, TOKENS_FIRST])
@pytest.mark.parametrize(
    ("kept", "dtype", "taken"),
    [
        (PageState((H, 2, 2, 2)), torch.bfloat16, torch.bfloat16),  # the cache's
        (PageState((H, 2, 2, 2)), torch.float32, torch.float32),
        (PageState((1, 8), torch.int32), torch.bfloat16, torch.int32),
        (PageState((H, 1, 4), torch.float32), torch.float16, torch.float32),
    ],
)
def test_what_a_policy_keeps_lies_behind_keys_and_values(
    kept: PageState, dtype: torch.dtype, taken: torch.dtype, steps: tuple[int, int]
) -> None:
    memory = pool(dtype)
    state = page_state(cache(memory, steps), kept)
    assert state is not None and (state.shape, state.dtype) == ((M, *kept.shape), taken)
    assert state.nbytes == M * kept.bytes(dtype.itemsize)
    numbers = torch.arange(1, state.numel() + 1).view(state.shape).to(taken)
    state.copy_(numbers)
    size = kept.bytes(dtype.itemsize) // dtype.itemsize
    pages = memory[START:].view(M, WIDE)
    assert torch.equal(pages[:, PAGE : PAGE + size].contiguous().view(taken).view(state.shape), numbers)
    assert not pages[:, :PAGE].any() and not pages[:, PAGE + size :].any() and not memory[:START].any()


@pytest.mark.parametrize(
    ("views", "steps"), [(cpu_views, HEADS_FIRST), (cuda_views, HEADS_FIRST), (cuda_views, TOKENS_FIRST)]
)
def test_keys_and_values_share_a_page_and_no_number(views: Callable[[Tensor], PagedKV], steps: tuple[int, int]) -> None:
    memory = pool()
    kv = views(cache(memory, steps))
    taken = torch.cat([written(half, memory).flatten() for half in (kv.key, kv.value)])
    inside = START + torch.arange(M)[:, None] * WIDE + torch.arange(PAGE)
    assert torch.equal(taken.sort().values, inside.flatten())


def test_a_policy_that_keeps_nothing_has_no_state() -> None:
    assert page_state(cache(pool()), None) is None
