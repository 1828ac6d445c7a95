"""Decoding: equal to the full forward, the same alone and in a batch, honest about bad input."""

import numpy as np
import pytest
import torch

from mor.generation import SamplingParams, generate, logprob, sample, stream
from mor.model.config import RouterConfig, preset
from mor.model.transformer import Transformer
from tests.conftest import cases, random_tokens, tiny

GREEDY = SamplingParams(max_new_tokens=10, temperature=0)


def greedy_by_full_forward(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits_BTV[0, -1].argmax()))
    return ids[len(prompt) :], model(torch.tensor([ids[:-1]])).routing.depth_BT[0].tolist()


@pytest.mark.parametrize("make", cases("singles", with_final=True))
def test_greedy_decoding_equals_repeated_full_forwards_token_by_token_and_depth_by_depth(make):
    model = make()
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 7)]
    for prompt, result in zip(prompts, generate(model, prompts, GREEDY), strict=True):
        tokens, depths = greedy_by_full_forward(model, prompt, 10)
        assert result.token_ids == tokens
        assert result.depths == depths
        assert result.finish_reason == "length"


FROM_0 = RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1))


def test_tokens_without_recursions_are_tokens():
    model = Transformer(preset("tiny", num_recursions=3, router=FROM_0)).init_weights()
    prompts = [[5, 6, 7, 8, 9], [0], [3, 1]]
    together = generate(model, prompts, GREEDY)
    for prompt, result in zip(prompts, together, strict=True):
        tokens, depths = greedy_by_full_forward(model, prompt, 10)
        assert result.token_ids == tokens and result.depths == depths and 0 in depths
        assert generate(model, [prompt], GREEDY)[0] == result
        assert result.mean_depth == sum(depths) / (len(prompt) + 9)
    events = [event for event in stream(model, prompts, GREEDY) if event.index == 1]
    assert [event.source_depth for event in events] == together[1].depths


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_no_token(value):
    logits = torch.tensor([2.0, value, 0.5])
    for params in (GREEDY, SamplingParams(), SamplingParams(top_k=1)):
        with pytest.raises(ValueError, match="not finite"):
            sample(logits, params, 0)
    with pytest.raises(ValueError, match="not finite"):
        logprob(logits, 0)
    model = tiny("expert_choice")
    with torch.no_grad():
        model.final_norm.weight[3] = value
    for params in (GREEDY, SamplingParams(max_new_tokens=2)):
        with pytest.raises(ValueError, match="its weights are broken"):
            generate(model, [[1, 2], [3]], params)


def test_the_smallest_temperatures_are_greedy():
    logits = torch.tensor([0.5, 2.0, 1.999, -900.0])
    for temperature in (1e-5, 1e-40, 5e-324):
        draws = [
            sample(logits, SamplingParams(temperature=temperature, seed=s), s) for s in range(9)
        ]
        assert draws == [1] * 9


def test_a_seeded_request_draws_the_same_alone_and_in_a_crowd():
    model = tiny("expert_choice")
    prompts = [random_tokens(n, seed=n).tolist() for n in (4, 7, 2)]
    params = [
        SamplingParams(max_new_tokens=n, temperature=0.9, top_k=20, top_p=0.95, seed=n)
        for n in (12, 5, 9)
    ]
    together = generate(model, prompts, params)
    for prompt, p, crowd in zip(prompts, params, together, strict=True):
        alone = generate(model, [prompt], p)[0]
        assert alone.token_ids == crowd.token_ids and len(alone.token_ids) == p.max_new_tokens
        other = generate(model, [prompt], SamplingParams(max_new_tokens=p.max_new_tokens, seed=99))[
            0
        ]
        assert other.token_ids != alone.token_ids


def test_stop_tokens_end_a_sequence_and_the_others_go_on():
    model = tiny("expert_choice")
    prompts = [random_tokens(n, seed=n).tolist() for n in (4, 7)]
    free = generate(model, prompts, GREEDY)
    stop = free[0].token_ids[3]
    first = free[0].token_ids.index(stop)
    stopped = generate(
        model,
        prompts,
        [
            SamplingParams(max_new_tokens=10, temperature=0, stop_token_ids=(stop,)),
            GREEDY,
        ],
    )
    assert stopped[0].token_ids == free[0].token_ids[: first + 1]
    assert stopped[0].finish_reason == "stop"
    assert stopped[1].token_ids == free[1].token_ids


def test_streaming_yields_what_generate_returns():
    model = tiny("token_choice")
    prompts = [random_tokens(n, seed=n).tolist() for n in (4, 7)]
    collected = {0: [], 1: []}
    for event in stream(model, prompts, GREEDY):
        collected[event.index].append(event.token_id)
        assert 1 <= event.source_depth <= 3
    assert [collected[0], collected[1]] == [r.token_ids for r in generate(model, prompts, GREEDY)]
    events = list(stream(model, prompts[:1], GREEDY))
    assert [e.finish_reason for e in events] == [None] * 9 + ["length"]


def test_max_depth_caps_every_token():
    for kind in ("fixed", "expert_choice", "token_choice", "random", "position", "frequency"):
        result = generate(tiny(kind), [random_tokens(30).tolist()], GREEDY, max_depth=2)[0]
        assert max(result.depths) == 2


def test_sampling_follows_the_distribution_that_its_settings_leave():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    # 0.56 + 0.21 >= 0.75
    settings = {
        SamplingParams(temperature=0.7): (logits / 0.7).softmax(0),
        SamplingParams(top_k=2): torch.cat([logits[:2].softmax(0), torch.zeros(3)]),
        SamplingParams(top_p=0.75): torch.cat([logits[:2].softmax(0), torch.zeros(3)]),
    }
    for params, expected in settings.items():
        draws = torch.tensor([sample(logits, params, counter) for counter in range(2000)])
        share = torch.bincount(draws, minlength=5) / 2000
        assert (share - expected).abs().max() < 0.04
        assert (share[expected == 0] == 0).all()
    assert sample(logits, SamplingParams(temperature=0), 0) == 0
    assert sample(logits, SamplingParams(top_p=1e-9), 0) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-1), "temperature"),
        (dict(top_k=-1), "top_k"),
        (dict(top_p=0), "top_p"),
        (dict(top_p=1.5), "top_p"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(min_p=1.5), "min_p"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(frequency_penalty=2.5), "frequency_penalty"),
        (dict(presence_penalty=-3), "presence_penalty"),
        (dict(logit_bias={1: float("inf")}), "logit_bias"),
        (dict(logit_bias={1: float("nan")}), "logit_bias"),
        (dict(logit_bias={-1: 0.0}), "logit_bias"),
        (dict(stop=("a", "")), "stop"),
        (dict(stop=5), "stop"),
        (dict(min_new_tokens=9, max_new_tokens=8), "min_new_tokens=9 is more than max_new_tokens"),
        (dict(structure="json"), "structure"),
    ],
)
def test_bad_sampling_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1: the prompt is empty"),
        ([[37]], "outside 0..36"),
        ([[-1]], "outside"),
        ([[1] * 60], "shorten the prompt"),
    ],
)
def test_bad_prompts_are_refused(prompts, words):
    with pytest.raises(ValueError, match=words):
        generate(tiny("fixed"), prompts, GREEDY)


def test_one_setting_per_prompt_or_one_for_all():
    with pytest.raises(ValueError, match="3 sampling settings for 1 prompts"):
        generate(tiny("fixed"), [[1]], [GREEDY] * 3)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("hi", "tokenizer makes them of text"),
        (["hi"], "prompt 0: a prompt must be a list of token ids, got 'hi'"),
        ([b"hi"], "got b'hi'"),
        ([1, 2], "put a single prompt into a list"),
        (torch.tensor([1, 2]), "put a single prompt into a list"),
        (None, "must be a list of prompts"),
        ({1}, "must be a list of prompts"),
        ([None], "got None"),
        ([[[1]]], r"whole numbers, got \[1\] at place 0"),
        ([[1, 2.0]], "got 2.0 at place 1"),
        ([[True]], "got True"),
        (torch.tensor([[1.0]]), "got 1.0"),
        ([[2**70]], "outside 0..36"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, words):
    with pytest.raises(ValueError, match=words):
        stream(tiny("fixed"), prompts, GREEDY)


@pytest.mark.parametrize(
    "prompts",
    [
        torch.tensor([[1, 2, 3]]),
        [np.array([1, 2, 3], dtype=np.int32)],
        [(1, np.int64(2), torch.tensor(3))],
        (range(1, 4),),
    ],
)
def test_prompts_of_tensors_arrays_and_other_sequences(prompts):
    (found,) = generate(tiny(), prompts, GREEDY)
    (expected,) = generate(tiny(), [[1, 2, 3]], GREEDY)
    assert found == expected and all(type(token_id) is int for token_id in found.prompt_ids)


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, [{}], [None], "x", 5])
def test_settings_of_another_type_are_refused(params):
    with pytest.raises(ValueError, match="must be SamplingParams"):
        generate(tiny("fixed"), [[1]], params)


def test_what_needs_a_tokenizer_or_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="stop strings cannot be followed without a tokenizer"):
        generate(tiny("fixed"), [[1]], SamplingParams(max_new_tokens=1, stop=("a",)))
    with pytest.raises(ValueError, match=r"logit_bias has token ids outside 0\.\.36"):
        generate(tiny("fixed"), [[1]], SamplingParams(max_new_tokens=1, logit_bias={37: 1.0}))


def test_stop_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"stop_token_ids has token ids outside 0\.\.36"):
        generate(tiny("fixed"), [[1]], SamplingParams(max_new_tokens=1, stop_token_ids=(37,)))


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([1.0, 3.0, 2.0, -5.0])
    assert sample(logits, SamplingParams(temperature=5e-324), 0) == 1


@pytest.mark.parametrize("max_depth", [0, 4, True, 2.0, "2"])
def test_a_depth_beyond_the_model_is_refused_before_the_first_token(max_depth):
    for decode in (generate, stream):
        with pytest.raises(ValueError, match=r"max_depth must be a whole number in 1\.\.3"):
            decode(tiny(), [[1]], GREEDY, max_depth=max_depth)


def test_settings_may_be_numbers_of_numpy_and_tensors():
    plain = SamplingParams(max_new_tokens=5, top_k=3, seed=4, top_p=0.5, stop_token_ids=(1, 2))
    given = SamplingParams(
        max_new_tokens=np.int32(5),
        top_k=torch.tensor(3),
        seed=np.int64(4),
        top_p=np.float32(0.5),
        stop_token_ids=np.array([1, 2]),
    )
    assert given == plain and type(given.seed) is int
    bias = SamplingParams(logit_bias={np.int64(3): np.float32(0.5)}, stop="a").logit_bias
    assert bias == {3: 0.5} and type(next(iter(bias))) is int
    assert SamplingParams(stop="ab").stop == SamplingParams(stop=["ab"]).stop == ("ab",)
    assert hash(SamplingParams(logit_bias={3: 0.5})) is not None
    for stops in (torch.tensor([1, 2]), [np.int64(1), 2], (1, torch.tensor(2))):
        assert SamplingParams(stop_token_ids=stops).stop_token_ids == (1, 2)
    for wrong in (np.array([1.0]), np.array([True]), np.array(1), [[1]]):
        with pytest.raises(ValueError, match="stop_token_ids"):
            SamplingParams(stop_token_ids=wrong)
