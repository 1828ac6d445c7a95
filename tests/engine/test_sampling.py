"""Requests are sampled in a crowd as alone."""

import pytest
import torch

from mor.answer import Answer
from mor.engine import Engine, SamplingParams
from mor.engine.sampling import (
    SamplingRows,
    adjusted_rows,
    logprob_rows,
    next_tokens,
    sample_rows,
    score_rows,
)
from mor.generation import adjusted, logprob, sample, top_logprobs
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


LOW = float("-inf")
ADVERSARIAL = [
    dict(logit_bias={3: 100.0}),
    dict(logit_bias=dict.fromkeys(range(36), LOW)),  # all but one
    dict(logit_bias=dict.fromkeys(range(36), LOW), temperature=0.0, top_k=5, min_p=1.0),
    dict(logit_bias=dict.fromkeys(range(30), LOW), top_k=10, top_p=0.9, repetition_penalty=1.5),
    dict(repetition_penalty=1.2, temperature=0.0),
    dict(repetition_penalty=0.5, frequency_penalty=2.0, presence_penalty=-2.0),
    dict(frequency_penalty=-2.0, presence_penalty=2.0, temperature=0.0),
    dict(min_p=1.0),
    dict(min_p=0.5, top_k=3),
    dict(min_p=0.2, top_p=0.6, temperature=3.0),
    dict(min_p=1e-300, temperature=5e-324),
    dict(min_new_tokens=9, stop_token_ids=tuple(range(36))),  # one token goes on
    dict(min_new_tokens=9, stop_token_ids=(1, 2), logit_bias={1: 100.0}, temperature=0.0),
    dict(),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("logits_are", ["spread", "ties"])
def test_every_wish_draws_as_the_plain_definition_does(dtype, logits_are):
    """With ties, nearly all tokens banned, answers that are empty, and prompts that repeat."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4 * len(ADVERSARIAL), 37, generator=generator) * 3
    logits = (logits.round() if logits_are == "ties" else logits).to(dtype)
    answers = []
    for i in range(len(logits)):
        settings = dict(max_new_tokens=9, seed=i) | ADVERSARIAL[i % len(ADVERSARIAL)]
        answers.append(Answer(SamplingParams(**settings), [i % 37, 5, 5]))
        for token_id in torch.randint(0, 37, (i % 7,), generator=generator).tolist():
            answers[-1].take(token_id)
    want = [
        sample(row, answer.params, len(answer.token_ids), answer)
        for row, answer in zip(logits, answers, strict=True)
    ]
    assert [drawn.token_id for drawn in next_tokens(logits, answers)] == want
    changing = [answer for answer in answers if answer.changes_logits]
    rows = logits[[answer.changes_logits for answer in answers]]
    expected = [adjusted(row, answer) for row, answer in zip(rows, changing, strict=True)]
    assert torch.equal(adjusted_rows(rows, changing), torch.stack(expected))
    for wish, answer, token_id in zip(ADVERSARIAL * 4, answers, want, strict=True):
        if wish.get("logit_bias", {}).get(0) == LOW:
            assert token_id >= 30
        assert answer.may_end or token_id not in answer.params.stop_token_ids


def test_penalties_count_what_they_say():
    """Repetition: prompt and answer; frequency and presence: the answer alone."""
    logits = torch.tensor([4.0, -4.0, 4.0, 0.0, 1.0])
    settings = dict(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    answer = Answer(SamplingParams(logit_bias={4: 1.0, 3: -1.0}, **settings), [0, 1, 1])
    for token_id in (2, 2, 4):
        answer.take(token_id)
    want = torch.tensor([2.0, -8.0, 2.0 - 2 * 0.5 - 0.25, -1.0, 1.0 - 0.5 - 0.25])
    assert torch.equal(adjusted(logits, answer), want)
    assert torch.equal(adjusted_rows(logits[None], [answer])[0], want)


def test_min_p_keeps_a_share_of_the_likeliest_token():
    logits = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()
    drawn = {sample(logits, SamplingParams(min_p=0.2), i) for i in range(200)}
    assert drawn == {0, 1}
    assert {sample(logits, SamplingParams(min_p=1), i) for i in range(20)} == {0}


def test_a_row_without_any_token_left_says_so_and_the_others_draw():
    logits = torch.randn(3, 37, generator=torch.Generator().manual_seed(1))
    nothing = SamplingParams(logit_bias=dict.fromkeys(range(37), LOW))
    answers = [Answer(p, [1]) for p in (SamplingParams(), nothing, SamplingParams(min_p=0.1))]
    logits[2, 4] = float("nan")
    first, second, third = next_tokens(logits, answers)
    assert first.token_id == sample(logits[0], SamplingParams(), 0)
    assert second.token_id is None and "forbid every token" in second.error
    assert third.token_id is None and third.error is None
    with pytest.raises(ValueError, match="forbid every token"):
        sample(logits[1], nothing, 0, answers[1])


def test_the_likeliest_tokens_of_each_row():
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(1)).round()
    for got, row in zip(score_rows(logits, [1, 2, 3, 4, 5], 9), logits, strict=True):
        want = top_logprobs(row, 9)
        assert [i for i, _ in got[1]] == [i for i, _ in want]
        assert [x for _, x in got[1]] == pytest.approx([x for _, x in want])
        assert [x for _, x in want] == sorted((x for _, x in want), reverse=True)
    params = [SamplingParams(top_logprobs=2), SamplingParams(logprobs=True), SamplingParams()]
    drawn = next_tokens(logits[:3], begun(params, [0] * 3))
    assert [len(each.top) for each in drawn] == [2, 0, 0]
    assert drawn[1].logprob == pytest.approx(logprob(logits[1], drawn[1].token_id))


def test_a_batch_without_wishes_looks_at_nothing_more(monkeypatch):
    def fail(*_):
        raise AssertionError("not needed here")

    for name in ("adjusted_rows", "score_rows"):
        monkeypatch.setattr(f"mor.engine.sampling.{name}", fail)
    logits = torch.randn(2, 37, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(), SamplingParams(temperature=0, stop_token_ids=(1,))]
    assert None not in tokens_of(logits, params, [0, 3])
