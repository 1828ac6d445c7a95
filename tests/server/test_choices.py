"""What an answer looks like: numbers of tokens, depths, log-probabilities."""

from types import SimpleNamespace

from mor.data.tokenizer import byte_tokenizer
from mor.server.choices import Choice, CompletionForm, new_depths, usage
from mor.server.protocol import CompletionRequest
from mor.server.token_texts import TokenTexts


def request(prompt, new, depths, **others):
    """As the engine leaves one behind: the last new token has no depth."""
    return SimpleNamespace(
        prompt_ids=list(range(prompt)),
        token_ids=list(range(new)),
        depths=depths,
        num_cached=1,
        logprobs=[-0.5] * new,
        top_logprobs=[[(3, -0.25), (7, -0.5)]] * new,
        text="x" * new,
        finish_reason="length",
        stop_reason=None,
        **others,
    )


def test_depths_are_those_of_the_tokens_that_predicted_the_new_ones():
    assert new_depths(request(3, 2, [1, 2, 3, 1])) == [3, 1]


def test_choices_of_one_prompt_count_it_once():
    found = usage([request(3, 2, [1, 2, 3, 1])] * 2 + [request(1, 2, [3, 1])] * 2, 2)
    assert found == {
        "prompt_tokens": 4,
        "completion_tokens": 8,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 2, "mean_depth": 9 / 4},
        "completion_tokens_details": {"mean_depth": 2.0},
    }


def form(**fields):
    body = CompletionRequest(prompt="abc", **fields)
    texts = TokenTexts(byte_tokenizer())
    choices = [Choice(i, None) for i in range(body.best_of or 1)]
    return CompletionForm(body, "model", texts, choices, prompts=1, nothing_new=False)


def test_the_token_itself_is_among_its_alternatives_and_of_equal_texts_the_better_stays():
    choice = form(logprobs=2).whole([request(3, 1, [1, 2, 3])])["choices"][0]
    texts = TokenTexts(byte_tokenizer())
    alternatives = {texts.text_of(3): -0.25, texts.text_of(7): -0.5, texts.text_of(0): -0.5}
    assert choice["logprobs"]["top_logprobs"] == [alternatives]
    assert "depths" not in choice and choice["mean_depth"] == 3


def test_nothing_is_told_of_log_probabilities_unless_they_were_asked_for():
    made = form(return_depths=True, return_token_ids=True).whole([request(3, 2, [1, 2, 3, 1])])
    choice = made["choices"][0]
    assert choice["logprobs"] is None
    assert (choice["depths"], choice["token_ids"]) == ([3, 1], [0, 1])


def test_the_best_choices_come_first_and_are_numbered_anew():
    requests = [request(3, 2, [1, 2, 3, 1]) for _ in range(3)]
    for made, score, text in zip(requests, (-3, -1, -2), "abc", strict=True):
        made.logprobs, made.text = [score, score], text
    found = form(n=2, best_of=3).whole(requests)["choices"]
    assert [(choice["index"], choice["text"]) for choice in found] == [(0, "b"), (1, "c")]
