"""MoA's influence is the derivative of the loss; what a candidate masks is what its served window does not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseserve.calibration.attention import Attention
from sparseserve.calibration.moa.answers import Answered, answered, is_right, logits, loss
from sparseserve.calibration.moa.answers import Draw as Prompts
from sparseserve.calibration.moa.profile import gradients, influence, masked_influence
from sparseserve.calibration.moa.validation import served
from sparseserve.calibration.moa.windows import candidates, keep, window
from sparseserve.calibration.subject import Subject, decode, load, prefill

RandomModel = Callable[..., Path]
STEP = 1e-3  # of the finite difference


def sample_of(subject: Subject, prompt: int, answer: int) -> Answered:
    ids = torch.randint(1, 250, (prompt + answer,), generator=torch.Generator().manual_seed(1)).tolist()
    return Answered(ids[:prompt], ids[prompt:], "", prefill(subject, ids[:prompt]))


def change_without(attention: Attention, row: int, token: int) -> Tensor:
    """How the outputs [Hq, Tq, D] change when one row is renormalised without one token."""

    def every(first: int, last: int) -> Tensor:
        return torch.ones(1, last - first, last, dtype=torch.bool)

    def without(first: int, last: int) -> Tensor:
        kept = every(first, last)
        if first <= row < last:
            kept[0, row - first, token] = False
        return kept

    return attention.masked_output(without) - attention.masked_output(every)


def derivative(subject: Subject, sample: Answered, layer: int, head: int, row: int, token: int) -> float:
    """Of the loss, in the direction in which the output of one head moves without one token; a central difference."""

    def at(step: float) -> float:
        def shift(attention: Attention) -> Tensor | None:
            if attention.layer != layer:
                return None
            change = torch.zeros_like(attention.query)
            change[head] = change_without(attention, row, token)[head]
            return attention.output() + step * change

        with torch.no_grad():
            return float(loss(subject, sample, logits(subject, sample, shift)))

    return (at(STEP) - at(-STEP)) / (2 * STEP)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_influence_is_the_derivative_of_the_loss(kv_heads: int, random_model: RandomModel) -> None:
    """phi, because its norms are computed in the model's dtype: the loss is fp64, its difference quotient good
    to the square of the step. Tolerance: influence and direction are made of fp32 attention weights."""
    subject = load(str(random_model("phi", num_key_value_heads=kv_heads, initializer_range=0.2)))
    subject.model.double()
    sample = sample_of(subject, 90, 12)
    outputs, _ = gradients(subject, sample)
    for layer, head, row in [(0, 0, 89), (0, 3, 95), (1, 1, 92), (1, 2, 100)]:
        found = influence(*outputs[layer], 89, 101)[head, row - 89]
        order = found.argsort(descending=True)
        assert found[order[4]] > 1e-4
        for token in (order[0], order[2], order[4], order[30]):
            expected = abs(derivative(subject, sample, layer, head, row, int(token)))
            assert float(found[token]) == pytest.approx(expected, rel=1e-4, abs=1e-6 * float(found.max()))


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 1000.0])
def test_a_token_with_nearly_all_attention_keeps_its_influence(sharpness: float) -> None:
    """1 - A rounds to 0 in fp32 here; the change of the output does not."""
    torch.manual_seed(0)
    query, key, value, gradient = (
        torch.randn(4, 5, 8),
        torch.randn(2, 40, 8),
        torch.randn(2, 40, 8),
        torch.randn(4, 5, 8),
    )
    attention = Attention(0, query * sharpness, key, value, 8**-0.5)
    found = influence(attention, gradient, 35, 40)
    for row, token in [(row, int(found[head, row].argmax())) for row in range(5) for head in range(4)]:
        expected = (change_without(attention, 35 + row, token) * gradient).sum(-1).abs()[:, row]
        torch.testing.assert_close(found[:, row, token], expected, rtol=1e-3, atol=1e-5)


def test_a_row_of_one_token_has_the_influence_of_moa() -> None:
    attention = Attention(0, torch.randn(1, 1, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8), 1.0)
    gradient = torch.randn(1, 1, 8)
    torch.testing.assert_close(influence(attention, gradient, 0, 1), (gradient @ attention.value.mT).abs())


def test_a_candidate_masks_the_influence_of_the_tokens_that_it_does_not_read(random_model: RandomModel) -> None:
    subject = load(str(random_model("llama")))
    sample = sample_of(subject, 600, 40)
    alpha, beta = candidates([256, 600])
    (masked, stretched), _ = masked_influence(subject, sample, window(alpha, beta), (1, 2))
    assert masked.shape == stretched.shape == (2, 2, len(alpha))
    outputs, _ = gradients(subject, sample)
    for layer, (attention, gradient) in enumerate(outputs):
        everywhere = influence(attention, gradient, 599, 639).double()
        for choice in range(len(alpha)):
            lines = window(alpha[choice].expand(2), beta[choice].expand(2))
            expected = (everywhere * ~keep(lines, attention.group)(599, 639)).sum((1, 2)).view(2, 2).sum(1)
            torch.testing.assert_close(masked[layer, :, choice], expected, rtol=1e-6, atol=1e-12)
    assert (
        stretched[..., beta == 0] >= masked[..., beta == 0]
    ).all()  # a fixed window is a smaller part of a longer row
    whole = int((alpha + beta * 600).argmax())
    assert masked[..., whole].max() == 0 < masked[..., 0].min()


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_needle_is_found_when_decoding_step_by_step_finds_it(share: float, trained: Subject) -> None:
    """One pass over the answer's rows stands for the decode steps that would say it."""
    sample = answered(trained, Prompts(2, 0, None), "needle-0", 1024, "test")
    plan = [window(torch.zeros(4).double(), torch.full((4,), share).double())] * 4
    with torch.no_grad():
        scores = logits(trained, sample, served(plan))
    said = trained.tokenizer.decode(decode(trained, sample.prompt, 32, served(plan)))
    assert is_right(trained, sample, scores) == (sample.value in said) == (share == 1)
