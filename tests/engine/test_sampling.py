"""Requests are sampled in a crowd as alone."""

import pytest
import torch

from mor.answer import Answer
from mor.engine import Engine, SamplingParams
from mor.engine.sampling import SamplingRows, logprob_rows, next_tokens, sample_rows
from mor.generation import logprob, sample
from tests.conftest import tiny
from tests.engine.requests import draw_requests


def test_sampling_is_the_same_alone_and_in_a_crowd():
    model = tiny()
    prompts, params = draw_requests(20, seed=6, temperature=1.3)
    crowd = Engine(model).generate(prompts, params)
    for prompt, p, request in zip(prompts, params, crowd, strict=True):
        (alone,) = Engine(model).generate([prompt], p)
        assert alone.token_ids == request.token_ids


def test_rows_are_sampled_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 37, generator=generator) * 3
    params = [
        SamplingParams(
            temperature=(0.0, 0.7, 1.5)[i % 3],
            top_k=(0, 1, 5)[i % 4 % 3],
            top_p=(1.0, 0.5)[i % 2],
            seed=i,
        )
        for i in range(40)
    ]
    rows = SamplingRows.of(params, list(range(40)), logits.device)
    tokens = sample_rows(logits, rows).tolist()
    assert tokens == [sample(logits[i], p, i) for i, p in enumerate(params)]
    assert len(set(tokens)) > 10
    values = logprob_rows(logits, torch.tensor(tokens)).tolist()
    assert values == pytest.approx([logprob(logits[i], t) for i, t in enumerate(tokens)])


def begun(params, counters):
    """Answers that have so many tokens."""
    answers = [Answer(p, [0]) for p in params]
    for answer, count in zip(answers, counters, strict=True):
        answer.token_ids += [0] * count
    return answers


def tokens_of(logits, params, counters):
    return [drawn.token_id for drawn in next_tokens(logits, begun(params, counters))]


def test_rows_that_are_not_finite_leave_the_others_as_they_are():
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=(0.0, 1.0, 5e-324)[i % 3], seed=i) for i in range(6)]
    want = tokens_of(logits, params, [0] * 6)
    assert want == [sample(logits[i], p, 0) for i, p in enumerate(params)]
    for row, value in ((1, float("nan")), (3, float("inf")), (4, -float("inf"))):
        logits[row, 5] = value
        want[row] = None
    assert tokens_of(logits, params, [0] * 6) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_the_best_are_put_in_order_and_the_token_is_the_same(dtype):
    """Among equal logits too, at the edge of the best and inside, and of either sign."""
    generator = torch.Generator().manual_seed(1)
    few = torch.tensor([-2.5, -1.0, -0.0, 0.0, 1.0, 1.5, 3.0, -1e30])
    equal = few[torch.randint(0, len(few), (60, 97), generator=generator)]
    logits = torch.cat([equal, torch.randn(60, 97, generator=generator) * 3]).to(dtype)
    params = [
        SamplingParams(
            temperature=(0.0, 0.7, 1.5, 1e-3)[i % 4],
            top_k=(1, 5, 16)[i % 3],
            top_p=(1.0, 0.5)[i % 2],
            seed=i,
        )
        for i in range(120)
    ]
    want = [sample(row, p, i) for i, (row, p) in enumerate(zip(logits, params, strict=True))]
    rows = SamplingRows.of(params, list(range(120)), logits.device)
    for best in (16, 64, 97, None):
        assert sample_rows(logits, rows, best).tolist() == want
    assert tokens_of(logits, params, list(range(120))) == want


def test_a_request_without_top_k_draws_from_the_whole_vocabulary_beside_others():
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) * 0.01
    params = [SamplingParams(top_k=2), SamplingParams(seed=3)]
    drawn = {tokens_of(logits, params, [i, i])[1] for i in range(50)}
    assert len(drawn) > 40
