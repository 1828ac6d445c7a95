"""Stop strings, penalties, structures, log-probabilities: under every strategy what the plain
decoder makes of them, alone and in a crowd, through preemption and from cached prefixes."""

import functools
import json
import random

import pytest
import torch

from mor.answer import Answer
from mor.data.tokenizer import byte_tokenizer
from mor.engine import Engine, EngineConfig, SamplingParams
from mor.generation import generate, stream
from mor.structure import Structure
from tests.conftest import tiny
from tests.engine.requests import all_memory_is_back, same, small_pool

TOKENIZER = byte_tokenizer()
SCHEDULES = {
    "auto": {},
    "few-lanes": dict(max_num_seqs=4, lanes=2, prefill_chunk=5, page_size=3),
    "depth-wise": dict(batching="depth_wise", page_size=5),
    "lock-step": dict(batching="lock_step", max_num_seqs=5, page_size=3),
    "static": dict(batching="static", max_num_seqs=5),
    "device": dict(loop="device", max_num_seqs=6, lanes=3, page_size=3),
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
WISHES = [
    {},
    dict(logprobs=True, top_logprobs=3),
    dict(min_p=0.3, top_k=20),
    dict(repetition_penalty=1.3),
    dict(frequency_penalty=1.5, presence_penalty=0.5, min_new_tokens=4),
    dict(frequency_penalty=-1.0, top_p=0.9, logprobs=True),
    dict(logit_bias={5: 100.0, 6: -100.0, 7: float("-inf")}),
    dict(structure=Structure(kind="regex", text="[a-c]{2,5}(x|yz)")),
    dict(structure=Structure(kind="json_schema", text=json.dumps(SCHEMA)), top_logprobs=2),
    dict(prompt_logprobs=True, top_logprobs=2),
    dict(prompt_logprobs=True),
    dict(stop=("ab", "zz")),
]


@functools.cache
def _plain():
    """A model, requests with all kinds of wishes, and what the plain decoder makes of them. Some
    get a stop string that their text has, across tokens."""
    model, draw = tiny(vocab_size=257), random.Random(4)
    prompts, params = [], []
    for i, wish in enumerate([*WISHES, *WISHES]):
        prompts.append([draw.randrange(256) for _ in range(draw.randint(1, 14))])
        settings = dict(max_new_tokens=draw.randint(9, 24), seed=i, stop_token_ids=(256, i)) | wish
        params.append(SamplingParams(temperature=draw.choice([0.0, 1.0]), **settings))
    prompts[3] = prompts[2] = prompts[9] * 2  # a prefix that is cached, and is to be scored
    prompts[21] = prompts[9] * 2
    free = generate(model, prompts, params, tokenizer=TOKENIZER)
    for i in (0, 4, 5, 11, 12, 23):
        start = len(free[i].text) // 2
        if stop := free[i].text[start : start + 2]:
            params[i] = SamplingParams(**{**vars(params[i]), "stop": ("no such", stop)})
    for i in (1, 2, 13):
        params[i] = SamplingParams(**{**vars(params[i]), "stop_token_ids": free[i].token_ids[5:7]})
    return model, prompts, params, generate(model, prompts, params, tokenizer=TOKENIZER)


def _same(got, want):
    same(got, want)
    for request, generation in zip(got, want, strict=True):
        assert request.text == generation.text and request.stop_reason == generation.stop_reason
        for name in ("logprobs", "prompt_logprobs"):
            assert _numbers(getattr(request, name)) == pytest.approx(
                _numbers(getattr(generation, name)), abs=1e-4
            )
        for name in ("top_logprobs", "prompt_top_logprobs"):
            found, wanted = (_pairs(getattr(each, name)) for each in (request, generation))
            assert [i for i, _ in found] == [i for i, _ in wanted]
            assert [x for _, x in found] == pytest.approx([x for _, x in wanted], abs=1e-4)


def _numbers(values):
    return [value for value in values if value is not None]


def _pairs(lists):
    return [pair for pairs in lists if pairs is not None for pair in pairs]


def test_the_plain_decoder_ends_in_every_way():
    """Or the comparisons below would show little."""
    _, _, params, results = _plain()
    ended = {(r.finish_reason, type(r.stop_reason).__name__) for r in results}
    assert ended == {("length", "NoneType"), ("stop", "int"), ("stop", "str"), ("stop", "NoneType")}
    for p, result in zip(params, results, strict=True):
        if p.structure is not None and result.finish_reason == "stop":
            assert result.text.endswith(("x", "yz", "}"))


def _taken(text, **settings):
    """An answer that took these bytes one by one, as long as it went on; and what each showed."""
    answer = Answer(SamplingParams(**settings), [1], TOKENIZER)
    shown = []
    for token_id in TOKENIZER.encode(text):
        if answer.finish_reason is None:
            shown.append(answer.take(token_id))
    return answer, shown


def test_a_stop_string_before_min_new_tokens_is_text():
    answer, shown = _taken("a--b--c", stop=("--",), min_new_tokens=5)
    assert (answer.text, answer.stop_reason) == ("a--b", "--") and "".join(shown) == "a--b"
    answer, _ = _taken("a--b", stop=("--",), min_new_tokens=3)
    assert (answer.text, len(answer.token_ids)) == ("a", 3), "there are as many as that"


def test_the_last_token_shows_what_was_held_back():
    answer, shown = _taken("ab-", stop=("--",), max_new_tokens=3)
    assert shown == ["a", "b", "-"] and (answer.text, answer.finish_reason) == ("ab-", "length")
    answer, shown = _taken("ab-c", stop=("--",), stop_token_ids=TOKENIZER.encode("c"))
    assert shown == ["a", "b", "", "-"] and answer.text == "ab-"
    engine = Engine(tiny(vocab_size=257), TOKENIZER)
    request = engine.add_request([1], SamplingParams(max_new_tokens=9, logit_bias={224: 100.0}))
    while len(request.token_ids) < 3:  # the first byte of a character, again and again
        engine.step()
    before = request.text
    output = engine.abort(request)
    assert output.finish_reason == "abort" and request.text == before + output.text
    assert request.text == TOKENIZER.decode(request.token_ids)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_strategy_writes_what_the_plain_decoder_writes(schedule):
    model, prompts, params, want = _plain()
    engine = Engine(model, TOKENIZER, EngineConfig(**SCHEDULES[schedule]))
    _same(engine.generate(prompts, params), want)
    _same(engine.generate(prompts[:12], params[:12]), want[:12])  # now from cached prefixes
    all_memory_is_back(engine)


@pytest.mark.parametrize("schedule", ["auto", "device"])
def test_alone_as_in_a_crowd(schedule):
    model, prompts, params, want = _plain()
    for i in range(12, 24):
        engine = Engine(model, TOKENIZER, EngineConfig(**SCHEDULES[schedule]))
        _same(engine.generate(prompts[i : i + 1], params[i]), want[i : i + 1])


@pytest.mark.parametrize("schedule", ["depth-wise", "lock-step", "device"])
def test_through_preemption(schedule):
    model, prompts, params, want = _plain()
    settings = SCHEDULES[schedule] | dict(
        page_size=2, max_num_seqs=8, kv_cache_memory=small_pool(model, 60, page_size=2)
    )
    engine = Engine(model, TOKENIZER, EngineConfig(**settings))
    _same(engine.generate(prompts, params), want)
    assert engine.scheduler.preemptions > 0
    all_memory_is_back(engine)


@pytest.mark.parametrize("schedule", ["auto", "device"])
def test_streamed_text_is_the_text(schedule):
    model, prompts, params, want = _plain()
    engine = Engine(model, TOKENIZER, EngineConfig(**SCHEDULES[schedule]))
    shown = {f"#{i}": "" for i in range(len(prompts))}
    for output in engine.stream(prompts, params):
        shown[output.request.request_id] += output.text
        assert (output.logprob is not None) == output.request.params.logprobs
        assert len(output.top_logprobs or []) == output.request.params.top_logprobs
    assert list(shown.values()) == [generation.text for generation in want]
    shown = [""] * len(prompts)
    for event in stream(model, prompts, params, tokenizer=TOKENIZER):
        shown[event.index] += event.text
    assert shown == [generation.text for generation in want]


def test_log_probabilities_of_a_prompt_are_those_of_the_full_forward():
    model = tiny(vocab_size=257)
    ids = list(range(40, 65))
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=True, top_logprobs=2)
    engine = Engine(model, config=EngineConfig(prefill_chunk=4, page_size=3))
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits_BTV[0].log_softmax(-1)
    for _ in range(2):  # the second time the prompt is cached
        (request,) = engine.generate([ids], params)
        assert request.prompt_logprobs[0] is None and request.prompt_top_logprobs[0] is None
        found = torch.tensor(request.prompt_logprobs[1:])
        torch.testing.assert_close(found, scores[range(24), ids[1:]], atol=1e-4, rtol=0)
        for best, row in zip(request.prompt_top_logprobs[1:], scores, strict=False):
            assert [i for i, _ in best] == row.topk(2).indices.tolist()


def _random_wishes(draw, seed):
    """Any of the settings together with any others."""
    low = float("-inf")
    structures = [wish["structure"] for wish in WISHES if "structure" in wish]
    choices = dict(
        temperature=[0.0, 0.7, 2.0],
        top_k=[1, 5, 40],
        top_p=[0.5, 0.95],
        min_p=[0.05, 1.0],
        stop=[("a",), ("ab", "b"), ("\ufffd",), ("e", "\n", "xyz")],
        stop_token_ids=[(256,), tuple(range(0, 256, 7)), tuple(range(60))],
        min_new_tokens=[1, 5],
        repetition_penalty=[0.8, 1.5],
        frequency_penalty=[-0.5, 2.0],
        presence_penalty=[-2.0, 0.3],
        logit_bias=[{97: 100.0, 98: 99.0}, dict.fromkeys(range(128, 256), low)],
        structure=structures,
        logprobs=[True],
        top_logprobs=[1, 4],
        prompt_logprobs=[True],
    )
    picked = {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.3}
    return SamplingParams(max_new_tokens=draw.randint(5, 30), seed=seed, **picked)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_any_settings_together_under_any_schedule(seed):
    """With requests that come while others run, and some that leave."""
    draw = random.Random(seed)
    routers = ["expert_choice", "token_choice", "fixed"]
    kv_strategy = draw.choice(["shared", "hybrid", "recursion_wise"])
    model = tiny(draw.choice(routers), vocab_size=257, seed=seed, kv_strategy=kv_strategy)
    common = [draw.randrange(256) for _ in range(12)]
    prompts = [
        [*common[: draw.randint(0, 12)], *(draw.randrange(256) for _ in range(draw.randint(1, 15)))]
        for _ in range(30)
    ]
    params = [_random_wishes(draw, i) for i in range(30)]
    want = generate(model, prompts, params, tokenizer=TOKENIZER)
    memory = small_pool(model, 60, page_size=4)
    for schedule in SCHEDULES.values():
        settings = schedule | dict(page_size=4, kv_cache_memory=memory)
        engine = Engine(model, TOKENIZER, EngineConfig(**settings))
        requests, waiting, gone = [], list(zip(prompts, params, strict=True)), set()
        while waiting or engine.has_unfinished:
            while waiting and draw.random() < 0.4:
                requests.append(engine.add_request(*waiting.pop(0)))
            engine.step()
            if requests and draw.random() < 0.02 and engine.abort(draw.choice(requests)):
                gone.update(r.request_id for r in requests if r.finish_reason == "abort")
        kept = [i for i, request in enumerate(requests) if request.request_id not in gone]
        _same([requests[i] for i in kept], [want[i] for i in kept])
        for i in set(range(30)) - set(kept):
            cut = requests[i]
            assert cut.token_ids == want[i].token_ids[: len(cut.token_ids)]
        all_memory_is_back(engine)
