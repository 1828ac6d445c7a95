"""What strategies share: measurements, and how a request ends."""

from types import SimpleNamespace

import pytest

from mor.answer import Answer
from mor.engine.request import Request
from mor.engine.sampling import Drawn
from mor.engine.strategy import Measurements, Work
from mor.generation import SamplingParams
from mor.model.budget import Budget


def test_parts_add_up_until_they_are_cleared():
    measured = Measurements()
    for tokens in (3, 4):
        with measured.part("block", tokens):
            pass
    assert measured.tokens == {"block": 7} and measured.passes == {"block": 2}
    assert measured.seconds["block"] > 0
    measured.clear()
    assert not measured.tokens and not measured.passes and not measured.seconds


@pytest.mark.parametrize(
    ("tokens", "reason"), [([5, 5, 5], "length"), ([5, 9], "stop"), ([5, 5], None)]
)
def test_a_request_ends_at_a_stop_token_or_at_its_length(tokens, reason):
    ended = []
    work = Work(SimpleNamespace(kv=None), SimpleNamespace(finish=ended.append), lanes=1)
    params = SamplingParams(max_new_tokens=3, stop_token_ids=(9,))
    request = work.requests["a"] = Request("a", Answer(params, [1]), 0, Budget(3, (), own=True))
    for token in tokens:
        work.take(request, Drawn(token, logprob=-1.0), depth=2)
    assert request.token_ids == tokens and request.depths == [2] * len(tokens)
    assert request.logprobs == [], "they were not asked for"
    assert request.finish_reason == reason
    assert ended == ([request] if reason else []) and bool(work.requests) == (reason is None)
    outputs = work.collect()
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(tokens) - 1)
    assert outputs[-1].finish_reason == reason and work.collect() == []
