"""MoA: what every head spans, and that what it left behind is never needed again."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseserve.artifacts import load, moa_density
from sparseserve.errors import ArtifactError
from sparseserve.model import ModelShape
from sparseserve.policies import Moa
from sparseserve.testing.bed import Bed
from sparseserve.types import HeadShape, Role, Window
from tests.helpers.artifact_files import head_map, moa_plan

SINK, MINIMUM, PAGE = 64, 128, 64
CANDIDATES = [*product(range(-1024, 9216, 1024), [k / 8 for k in range(9)])]  # what MoA's optimiser chooses from
LENGTHS = torch.arange(1, 20001, dtype=torch.int32)


def window(*lines: tuple[float, float], align: int = PAGE) -> Window:
    """One head whose query heads have these (alpha, beta)."""
    alpha, beta = torch.tensor(lines, dtype=torch.float64).T
    return Window(torch.tensor([SINK], dtype=torch.int32), alpha[None], beta[None], MINIMUM, align)


def spans(length: int, *lines: tuple[float, float]) -> list[int]:
    """The spans of `window` at one length."""
    return window(*lines).spans(torch.tensor(length, dtype=torch.int32))[0].tolist()


def starts(*lines: tuple[float, float], align: int = PAGE) -> Tensor:
    """Where the most recent tokens start at each of LENGTHS."""
    return window(*lines, align=align).spans(LENGTHS)[:, 0, 1]


@pytest.mark.parametrize(
    ("alpha", "beta", "length", "start"),
    [
        (0, 0.5, 8192, 4160),  # 8192 - 4096 + 64
        (1024, 0, 5000, 4032),  # 4040, down to a page
        (-1024, 1, 3000, 1088),
        (0, 0.375, 4097, 2624),  # of 1536.375 tokens 1536
        (-1024, 1, 1000, 896),  # -24 tokens: the minimum, 936 down to a page
        (2048, 0, 1000, 0),  # more than there is
        (0, 0.5, 100, 0),  # shorter than the minimum
    ],
)
def test_a_head_spans_alpha_plus_beta_n(alpha: float, beta: float, length: int, start: int) -> None:
    assert spans(length, (alpha, beta)) == [SINK, start]


def test_the_sink_is_no_longer_than_the_row() -> None:
    assert spans(10, (1024, 0)) == [10, 0]
    assert spans(0, (1024, 0)) == [0, 0]


@pytest.mark.parametrize("align", [1, PAGE, 128])
def test_the_start_never_moves_back(align: int) -> None:
    for line in CANDIDATES:
        assert (starts(line, align=align).diff() >= 0).all()


def test_the_start_never_moves_back_for_published_plans(published: Path) -> None:
    files = [*published.glob("moa/*/moa_alpha_beta.json")]
    assert files
    for file in files:
        plan = load(file).tensors
        for line in {*zip(plan["alpha"].flatten().tolist(), plan["beta"].flatten().tolist(), strict=True)}:
            assert (starts(line).diff() >= 0).all()


def test_a_length_rounded_up_would_move_the_start_back() -> None:
    size = (LENGTHS * 0.5).clamp(min=MINIMUM)
    rounded_up = (size / PAGE).ceil() * PAGE
    assert ((LENGTHS - rounded_up + SINK).diff() < 0).any()


def test_a_kv_head_spans_what_the_longest_of_its_query_heads_does() -> None:
    lines = [(1024, 0), (0, 0.5), (-1024, 1)]  # each is the longest somewhere
    alone = torch.stack([starts(line) for line in lines])
    together = starts(*lines)
    assert torch.equal(together, alone.amin(0))
    assert all((alone[i] > together).any() for i in range(len(lines)))


MODEL = ModelShape("bed", 2, HeadShape(kv_heads=2, queries_per_kv=2, head_dim=32), max_len=768, page_size=PAGE)
ALPHA = [[-64, 0, 128, 200], [0, 300, 0, 0]]
BETA = [[0.5, 0.375, 0, 0.125], [0.25, 0, 1, 0]]


def test_a_ragged_batch_attends_to_just_these_tokens() -> None:
    random = torch.Generator().manual_seed(3)
    lengths, heads = [700, 129, 64, 768, 333], MODEL.heads
    query = torch.randn(2, len(lengths), heads.query_heads, heads.head_dim, generator=random)
    key, value = torch.randn(2, 2, len(lengths), MODEL.max_len, heads.kv_heads, heads.head_dim, generator=random)
    policy = Moa(artifact=moa_plan(ALPHA, BETA))
    outcome = Bed(policy, MODEL, lengths, dtype=torch.float32).fill(key, value).decode(query)
    for layer, (row, length), head in product(range(2), enumerate(lengths), range(4)):
        group = [head // 2 * 2, head // 2 * 2 + 1]
        size = max(MINIMUM, *(int(ALPHA[layer][h] + BETA[layer][h] * length) for h in group))
        start = max(0, length - size + SINK) // PAGE * PAGE
        tokens = [t for t in range(length) if t < SINK or t >= start]
        keys, values = (x[layer, row, tokens, head // 2].double() for x in (key, value))
        weights = (keys @ query[layer, row, head].double() * heads.head_dim**-0.5).softmax(0)
        torch.testing.assert_close(outcome.out[layer, row, head].double(), weights @ values, rtol=0, atol=1e-5)


def test_ranks_take_their_own_heads() -> None:
    policy = Moa(artifact=moa_plan([[*range(0, 800, 100)]], [[0.5] * 8]))
    half = HeadShape(kv_heads=2, queries_per_kv=2, head_dim=32)
    for rank, first in enumerate((0, 400)):
        (plan,) = policy.plans(ModelShape("m", 1, half, 8192, PAGE, rank=rank, ranks=2))
        assert plan.role is Role.WINDOW and plan.window is not None
        assert plan.window.alpha.tolist() == [[first, first + 100], [first + 200, first + 300]]


@pytest.mark.parametrize(("length", "density"), [(8192, 0.659), (32768, 0.620)])
def test_a_published_plan_reads_what_its_density_says(published: Path, length: int, density: float) -> None:
    file = published / "moa" / "meta-llama--Llama-3.2-1B-Instruct" / "moa_alpha_beta.json"
    model = ModelShape("Llama-3.2-1B", 16, HeadShape(kv_heads=8, queries_per_kv=4, head_dim=64), 131072, page_size=64)
    policy = Moa(artifact=str(file))
    read = sum(policy.expected_tokens(plan, length) for plan in policy.plans(model)) / 16 / length
    tensors = load(file).tensors
    exact = moa_density(tensors["alpha"], tensors["beta"], length, group=4).mean().item()
    assert exact == pytest.approx(density, abs=5e-4)
    assert exact <= read <= exact + PAGE / length  # the rest of the first page


def test_plans_of_other_models_and_other_kinds_are_refused() -> None:
    with pytest.raises(ArtifactError, match="layers = 1"):
        Moa(artifact=moa_plan([[0.0] * 4], [[0.5] * 4])).plans(MODEL)
    with pytest.raises(ArtifactError, match="kind moa.*--policy retrieval"):
        Moa(artifact=head_map([[1, 0]] * 2)).plans(MODEL)


def test_a_sink_without_recent_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="sink_tokens = 64 leave no recent token"):
        Moa(artifact="plan", minimum_tokens=64)
