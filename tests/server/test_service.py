"""Requests become jobs of the engine."""

import asyncio
from types import SimpleNamespace

import pytest

from mor.data.tokenizer import byte_tokenizer
from mor.engine import Engine, EngineConfig
from mor.server import service as module
from mor.server.errors import ApiError
from mor.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mor.server.service import depth_at, serve
from tests.conftest import tiny
from tests.server.served import make_engine, make_service, parts

TURNS = [{"role": "user", "content": "a"}]


def ready(made=None, **config):
    """A service whose engine is there, without a thread."""
    service = make_service(**config)
    service._served = made or serve(make_engine())
    service.thread.check_open = lambda: service._served.engine
    return service


def completion(service, **body):
    return asyncio.run(service.completion(CompletionRequest(**body)))[0]


def chat(service, **body):
    return asyncio.run(service.chat(ChatRequest(**{"messages": TURNS} | body)))[0]


def test_defaults_are_openai_s_and_a_seed_is_drawn_where_none_is_given():
    service = ready()
    first, second = (completion(service, prompt="abc")[0] for _ in range(2))
    assert first.params.max_new_tokens == 16 and first.params.temperature == 1
    assert first.params.stop_token_ids == parts()[1].end_ids
    assert first.params.seed != second.params.seed and first.params.seed >= 0
    assert first.params.logprobs is False
    assert completion(service)[0].prompt_ids == [parts()[1].end_of_text_id]


def test_a_chat_may_fill_what_the_model_holds():
    job = chat(ready())[0]
    assert len(job.prompt_ids) + job.params.max_new_tokens == 128
    long = completion(ready(), prompt="a" * 120)[0]
    assert long.params.max_new_tokens == 8, "the default shrinks to the room that is left"


def test_seeds_of_choices_stay_within_64_bits():
    jobs = completion(ready(), prompt="a", n=3, seed=2**63 - 2)
    assert [job.params.seed for job in jobs] == [2**63 - 2, 2**63 - 1, -(2**63)]


def test_ends_are_left_out_on_demand_and_others_are_added():
    service = ready()
    assert completion(service, prompt="a", ignore_eos=True)[0].params.stop_token_ids == ()
    ends = completion(service, prompt="a", stop_token_ids=[7])[0].params.stop_token_ids
    assert ends == (*parts()[1].end_ids, 7)
    assert chat(service)[0].params.stop_token_ids == service.served.chat.stop_token_ids


def test_logprobs_are_computed_only_where_they_are_needed():
    service = ready()
    params = completion(service, prompt="a", logprobs=3, echo=True)[0].params
    assert (params.logprobs, params.top_logprobs, params.prompt_logprobs) == (True, 3, True)
    params = completion(service, prompt="a", best_of=2)[0].params
    assert (params.logprobs, params.top_logprobs, params.prompt_logprobs) == (True, 0, False)
    params = chat(service, logprobs=True)[0].params
    assert (params.logprobs, params.top_logprobs) == (True, 0)


def test_a_model_without_a_template_says_how_to_give_it_one(tmp_path):
    model, _ = parts()
    plain = Engine(model, byte_tokenizer(), EngineConfig(kv_cache_memory=1 << 20))
    service = ready(serve(plain))
    with pytest.raises(ApiError, match=r"no chat template.*--chat-template") as refused:
        chat(service)
    assert refused.value.status == 400
    template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    given = ready(serve(plain, template))
    assert chat(given)[0].prompt_ids == byte_tokenizer().encode("a!")
    with pytest.raises(ValueError, match="template"):
        serve(plain, "{% broken")


def test_long_texts_are_tokenized_outside_the_event_loop(monkeypatch):
    used = []
    real = asyncio.to_thread

    async def noted(work, *arguments):
        used.append(work)
        return await real(work, *arguments)

    monkeypatch.setattr(module.asyncio, "to_thread", noted)
    service = ready()
    asyncio.run(service.tokenize(TokenizeRequest(prompt="a" * 100)))
    assert not used
    found = asyncio.run(service.tokenize(TokenizeRequest(prompt="a" * 30_000)))
    assert len(used) == 1 and found["count"] == 30_000
    again = DetokenizeRequest(tokens=found["tokens"])
    assert asyncio.run(service.detokenize(again)) == {"prompt": "a" * 30_000} and len(used) == 2
    body = TokenizeRequest(prompt="a" * 30_000, return_token_strs=True)
    assert asyncio.run(service.tokenize(body))["token_strs"] == ["a"] * 30_000
    assert len(used) == 4


def test_more_choices_than_one_request_may_have_are_refused():
    service = ready(max_choices=4)
    with pytest.raises(ApiError, match="5 choices, one request may have 4"):
        completion(service, prompt=["a"] * 5)
    with pytest.raises(ApiError, match="6 choices"):
        completion(service, prompt=["a"] * 2, n=1, best_of=3)


def test_a_model_without_a_choice_of_depths_says_why():
    vanilla, random = (
        tiny("fixed", num_recursions=1, vocab_size=259),
        tiny("random", vocab_size=259),
    )
    for model, max_depth, words in (
        (vanilla, None, "leave out depth"),
        (random, 2, "max_depth=2"),
        (parts()[0], None, "mor calibrate"),
    ):
        settings = EngineConfig(max_depth=max_depth, kv_cache_memory=1 << 20)
        service = ready(serve(Engine(model, parts()[1], settings)))
        assert service.depth_range() is None
        for wish in ({"depth": 2}, {"reasoning_effort": "high"}):
            with pytest.raises(ApiError, match=words) as refused:
                completion(service, prompt="a", **wish)
            assert refused.value.status == 400 and refused.value.info["param"] == next(iter(wish))


def test_requests_are_refused_for_their_length_before_each_of_their_ids_is_looked_at():
    service = ready(max_choices=4)
    with pytest.raises(ApiError, match="prompt alone has 200"):
        completion(service, prompt=[999] * 200)
    with pytest.raises(ApiError, match="5 choices"):
        completion(service, prompt=[[999]] * 5)


def test_an_engine_without_a_tokenizer_cannot_be_served():
    with pytest.raises(ValueError, match="with a tokenizer"):
        serve(SimpleNamespace(tokenizer=None))


def test_efforts_are_shares_of_the_calibrated_depths_or_the_nearest_that_can_be_had():
    ranges = [(1.0, 1.5), (2.0, 4.0)]
    assert [depth_at(share, ranges) for share in (0, 1 / 3, 2 / 3, 1)] == [1.0, 2.0, 3.0, 4.0]
    assert depth_at(0.2, ranges) == 1.5


class Table:
    """As calibration leaves one: depths up to 4 need a fourth recursion."""

    budgets = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)

    def reachable(self):
        return [(1.0, 4.0)]

    def recursions(self, budget):
        return int(budget)

    def at(self, budget):
        if budget > 4:
            raise ValueError("it has 1 to 4")
        return [0.5] * 3


def test_a_calibrated_model_says_which_depths_it_has_and_requests_become_settings():
    made = serve(make_engine())
    service = ready(made)
    assert service.depth_range() is None
    try:
        made.engine.model.depth_table = Table()
        assert service.depth_range() == (1.0, 3.0), "as many recursions as the engine holds"
        assert service.card()["mor"]["depths"] == {"min": 1.0, "max": 3.0}
        low = CompletionRequest(prompt="a", reasoning_effort="low")
        assert service._depth(low)["depth"] == pytest.approx(5 / 3)
        assert service._depth(CompletionRequest(prompt="a", depth=2.2)) == {"depth": 2.2}
        assert service._depth(CompletionRequest(prompt="a", depth="full")) == {"depth": "full"}
        assert service._depth(CompletionRequest(prompt="a")) == {}
        for depth, words in ((5, "it has 1 to 4"), (4, r"holds 3; .*mor serve --deepest 4")):
            with pytest.raises(ApiError, match=words) as refused:
                service._depth(CompletionRequest(prompt="a", depth=depth))
            assert refused.value.info["param"] == "depth"
    finally:
        made.engine.model.depth_table = None
