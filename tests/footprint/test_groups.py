"""Which heads store what: windows never want back what they freed, and heads share pages without meeting."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, combinations_with_replacement, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseserve.footprint.groups import MAX_CLASSES, MAX_GROUPS, HeadWindow, Storage, store_heads
from sparseserve.model import ModelShape
from sparseserve.policies import Dense, Moa, Policy, Retrieval, Streaming
from sparseserve.types import HeadShape, LayerPlan

PAGE = 8
FOLDER = TemporaryDirectory()
ALPHAS, BETAS = st.sampled_from([-40, 0, 7.5, 24, 60]), st.sampled_from([0, 0.125, 0.3, 0.5, 0.9, 1])
WINDOWS = st.builds(
    HeadWindow,
    sink=st.integers(0, 20),
    alpha=st.floats(-30, 60),
    beta=st.floats(0, 1),
    minimum=st.integers(1, 30),
    dense_up_to=st.sampled_from([0, 1, 33]),
)


def moa(lines: Sequence[Sequence[tuple[float, float]]], sink: int = 5, minimum: int = 20, min_tokens: int = 0) -> Moa:
    """A plan of (alpha, beta) [L][Hq]."""
    path = Path(FOLDER.name) / "plan.json"
    alphas, betas = ([[line[part] for line in layer] for layer in lines] for part in (0, 1))
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return Moa(artifact=str(path), sink_tokens=sink, minimum_tokens=minimum, min_tokens=min_tokens)


def shape(layers: int, kv_heads: int, group: int = 1, max_len: int = 200, ranks: int = 1) -> ModelShape:
    return ModelShape("m", layers, HeadShape(kv_heads, group, 16), max_len, PAGE, ranks=ranks)


def of_ranks(policy: Policy, model: ModelShape) -> list[tuple[Storage, tuple[LayerPlan, ...]]]:
    """Storage and plans of every rank."""
    ranks = [replace(model, rank=rank) for rank in range(model.ranks)]
    return [(store_heads(policy, rank), policy.plans(rank)) for rank in ranks]


@st.composite
def plans(draw: st.DrawFn) -> tuple[Moa, ModelShape]:
    """A plan with few or many different lines, for one rank or several."""
    ranks, group = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 2]))
    model = shape(draw(st.integers(1, 4)), draw(st.integers(1, 3)), group, draw(st.sampled_from([40, 200, 333])), ranks)
    kinds = draw(st.lists(st.tuples(ALPHAS, BETAS), min_size=1, max_size=8))
    width = model.heads.query_heads * ranks
    lines = [draw(st.lists(st.sampled_from(kinds), min_size=width, max_size=width)) for _ in range(model.layers)]
    return moa(lines, draw(st.sampled_from([0, 5, 16])), min_tokens=draw(st.sampled_from([0, 50]))), model


@given(WINDOWS)
@settings(max_examples=300, deadline=None)
def test_what_a_window_dropped_it_never_wants_back(window: HeadWindow) -> None:
    starts = [window.start(length) for length in range(1, 400)]
    assert all(0 <= start < length for length, start in enumerate(starts, 1))
    assert all(earlier <= later for earlier, later in pairwise(starts))


@given(WINDOWS, st.integers(1, 400), st.integers(1, 16))
@settings(max_examples=300, deadline=None)
def test_pages_are_those_of_the_sink_and_of_the_last_tokens(window: HeadWindow, length: int, page: int) -> None:
    kept = {at // page for at in range(length) if at < window.sink or at >= window.start(length)}
    assert window.pages(length, page) == len(kept)
    assert window.freed_pages(length, page) == -(-length // page) - len(kept)


def test_a_span_by_hand() -> None:
    window = HeadWindow(sink=5, alpha=10, beta=0.25, minimum=24, dense_up_to=40)
    assert [window.start(length) for length in (1, 40, 41, 56, 100)] == [0, 0, 17, 32, 65]
    assert (window.sink_pages(4), window.freed_pages(100, 4), window.pages(100, 4)) == (2, 14, 11)
    assert window.pages(40, 4) == 10


@given(plans())
@settings(max_examples=200, deadline=None)
def test_every_head_has_a_place_of_its_own(case: tuple[Moa, ModelShape]) -> None:
    for storage, _ in of_ranks(*case):
        places = [tuple(place) for place in storage.places.flatten(0, 1).tolist()]
        assert len({*places}) == len(places)
        assert all(group < len(storage.windows) and slot < storage.slots for group, slot in places)
        assert sum(storage.group_heads(group) for group in range(len(storage.windows))) == len(places)
        for layer, group in (
            (layer, group) for layer in range(case[1].layers) for group in range(len(storage.windows))
        ):
            slots = storage.places[layer, storage.heads(layer, group), 1].tolist()
            assert slots == [*range(slots[0], slots[0] + len(slots))] if slots else True


@given(plans())
@settings(max_examples=200, deadline=None)
def test_a_group_keeps_what_its_heads_attend_to_at_every_length(case: tuple[Moa, ModelShape]) -> None:
    policy, model = case
    lengths = torch.arange(1, model.max_len + 1, dtype=torch.int32)
    for storage, layers in of_ranks(policy, model):
        starts = {
            group: torch.tensor([window.start(int(length)) for length in lengths])
            for group, window in enumerate(storage.windows)
            if window is not None
        }
        for plan, (head, group) in ((p, h) for p in layers for h in enumerate(storage.places[p.layer, :, 0].tolist())):
            kept, window = storage.windows[group], plan.window
            if kept is None:  # in prompts vLLM attends to all of it
                assert window is None or (window.spans(lengths)[:, head].diff() <= 0).all()
                continue
            assert window is not None
            wanted = window.spans(lengths)[:, head, 1] * (lengths > policy.dense_up_to)
            assert (starts[group].diff() >= 0).all() and kept.sink >= window.sink[head]
            assert (starts[group] // PAGE <= wanted // PAGE).all()


@given(plans())
@settings(max_examples=200, deadline=None)
def test_ranks_agree_and_there_are_few_groups(case: tuple[Moa, ModelShape]) -> None:
    storages = [storage for storage, _ in of_ranks(*case)]
    assert len({(storage.slots, storage.windows) for storage in storages}) == 1
    windows = storages[0].windows
    assert len({window for window in windows if window is not None}) <= MAX_CLASSES and len(windows) <= MAX_GROUPS
    assert None not in windows[1:]


ROUNDED = Streaming(sink_tokens=4, recent_tokens=185, min_tokens=0)  # drops 11 tokens of 200, but no page of 8
LONGER = Streaming(sink_tokens=8, recent_tokens=200, min_tokens=0)


@pytest.mark.parametrize("policy", [Dense(), LONGER, ROUNDED], ids=str)
def test_heads_that_keep_every_page_are_one_group_and_attend_to_it(policy: Policy) -> None:
    model = shape(3, 2)
    assert store_heads(policy, model).windows == (None,)
    assert [policy.expected_tokens(plan, 200) for plan in policy.plans(model)] == [200] * 3


@pytest.mark.parametrize(("recent", "attended"), [(185, 200), (184, 188)])
def test_a_window_grows_to_the_pages_that_it_never_frees(recent: int, attended: int) -> None:
    policy = ROUNDED.model_copy(update={"recent_tokens": recent})
    assert [policy.expected_tokens(plan, 200) for plan in policy.plans(shape(1, 2))] == [attended]
    shared = policy.model_copy(update={"kv_memory": "shared"})
    assert [shared.expected_tokens(plan, 200) for plan in shared.plans(shape(1, 2))] == [4 + recent]


def tokens(storage: Storage, model: ModelShape) -> int:
    """Slots of tokens that the longest row takes."""
    return sum(storage.pages(model.max_len, PAGE)) * PAGE * storage.slots


def packings(sizes: list[int], full: int) -> Iterator[int]:
    """Tokens of slots of every packing of heads that keep `sizes` tokens, ascending; one size is in one class."""
    ends = [end for end, (size, larger) in enumerate(pairwise(sizes), 1) if size != larger]
    for slots in range(max(full, 1), full + len(sizes) + 1):
        for bounds in (bounds for count in range(MAX_CLASSES) for bounds in combinations(ends, count)):
            runs = [sizes[begin:end] for begin, end in pairwise([0, *bounds, len(sizes)])]
            parts = [-(-len(run) // slots) for run in runs]
            if sum(parts) + (full > 0) <= MAX_GROUPS:
                whole = 200 * slots if full else 0
                yield whole + sum(part * slots * max(run) for part, run in zip(parts, runs, strict=True))


@pytest.mark.parametrize("full", [0, 1, 3])
def test_no_packing_is_smaller(full: int) -> None:
    for windows in combinations_with_replacement((24, 48, 72, 120), 5):
        model = shape(1, full + len(windows))
        storage = store_heads(moa([[(0, 1)] * full + [(size, 0) for size in windows]], sink=0), model)
        sizes = sorted(HeadWindow(0, size, 0).pages(200, PAGE) * PAGE for size in windows)
        assert tokens(storage, model) == min(packings(sizes, full))


LLAMA_1B, LLAMA_8B, LLAMA_7B = (16, HeadShape(8, 4, 64)), (32, HeadShape(8, 4, 128)), (32, HeadShape(32, 1, 128))
PUBLISHED = {
    "moa/meta-llama--Llama-3.2-1B-Instruct/moa_alpha_beta.json": (*LLAMA_1B, 131072),
    "moa/gradientai--Llama-3-8B-Instruct-262k/moa_alpha_beta.json": (*LLAMA_8B, 262144),
    "duo/Llama-2-7B-32K-Instruct": (*LLAMA_7B, 32768),
    "duo/Meta-Llama-3.1-8B-Instruct": (*LLAMA_8B, 131072),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_plans_save_what_their_density_promises(published: Path, name: str) -> None:
    layers, heads, longest = PUBLISHED[name]
    artifact = str(published / name)
    policy = Moa(artifact=artifact) if name.startswith("moa") else Retrieval(artifact=artifact)
    model = ModelShape(name, layers, heads, longest, page_size=64)
    storage = store_heads(policy, model)
    density = sum(policy.expected_tokens(plan, longest) for plan in policy.plans(model)) / layers / longest
    kept = sum(storage.pages(longest, 64)) * storage.slots / (layers * heads.kv_heads * (longest // 64))
    assert density <= kept <= density / 0.9
