"""Problems in words: right answers, held-out numbers of steps, loss on answers only."""

import re
from itertools import pairwise

import pytest
import torch

from mor.data.config import DataConfig
from mor.data.corpus import load_corpus, vocab_size
from mor.data.sources import Document
from mor.data.tokenizer import byte_tokenizer, train_bpe
from mor.data.word_problems import WORD_TASKS, parse_word_task
from mor.evaluation.nll import by_hops
from mor.model.loss import IGNORED
from tests.conftest import tiny


def swaps(text):
    ball = re.search(r"under (\w)\.", text)[1]
    moves = re.findall(r" ([A-D])([A-D])", text)
    for a, b in moves:
        assert a != b
        ball = b if ball == a else a if ball == b else ball
    return ball, len(moves)


def relay(text):
    after = dict(re.findall(r"(\w+) passes to (\w+)", text))
    assert sorted(after) == sorted(after.values()) and len(after) == 12
    name, passes = re.search(r"(\w+) starts:((?: pass)+)", text).groups()
    start, times = name, passes.count("pass")
    for _ in range(times):
        name = after[name]
        assert name != start, "no relay comes round"
    return name, times


def arithmetic(text):
    modulus, value = map(int, re.search(r"modulo (\d+). Start with (\d+)", text).groups())
    moves = re.findall(r"(Add|Multiply by) (\d)", text)
    for how, number in moves:
        value = (value + int(number) if how == "Add" else value * int(number)) % modulus
    return str(value), len(moves)


SOLVE = {"swaps": swaps, "relay": relay, "arithmetic": arithmetic}


@pytest.mark.parametrize("name", WORD_TASKS)
def test_answers_are_right_and_validation_asks_for_more_steps(name):
    corpus = load_corpus(DataConfig(path=f"words:{name}?hops=3&held_out=2", tokenizer="bytes"))
    tokenizer, end = corpus.tokenizer, corpus.tokenizer.end_of_text_id
    for data, expected in ((corpus.train, {1, 2, 3}), (corpus.validation, {4, 5})):
        found = data.problems(range(6), 900)
        steps_seen, texts = set(), set()
        for ids, targets, hops in zip(*(x.tolist() for x in found), strict=True):
            assert ids.count(end) > 1, "several problems in a window"
            starts = [0, *(i + 1 for i, token in enumerate(ids) if token == end)]
            for start, after in pairwise(starts):
                if after == start + 1:  # the rest of the window
                    assert set(targets[start:]) == {IGNORED}
                    break
                text = tokenizer.decode(ids[start : after - 1])
                answer, steps = SOLVE[name](text)
                assert text.endswith(" " + answer)
                asked = [i for i in range(start, after) if targets[i] != IGNORED]
                assert tokenizer.decode([targets[i] for i in asked]) == " " + answer
                assert asked == list(range(after - 2 - len(answer) - 1, after - 2))
                # Of " 7" and " Anna" the second byte tells.
                assert [hops[i] for i in asked] == [0, steps] + [0] * (len(asked) - 2)
                steps_seen.add(steps)
                texts.add(text)
        assert steps_seen == expected and len(texts) > 11


@pytest.mark.parametrize("name", WORD_TASKS)
def test_every_step_is_asked_about_and_no_answer_is_told(name):
    corpus = load_corpus(
        DataConfig(path=f"words:{name}?hops=3&held_out=2&each=1"), byte_tokenizer()
    )
    end = corpus.tokenizer.end_of_text_id
    for data, asked_for in ((corpus.train, [1, 2, 3]), (corpus.validation, [4, 5])):
        ids, targets, hops = (x[0].tolist() for x in data.problems([0], 900))
        until = ids.index(end)
        at = [i for i in range(until) if targets[i] != IGNORED]
        assert [hops[i] for i in at] == asked_for and at[-1] == until - 1
        for i in at:
            answer, steps = SOLVE[name](corpus.tokenizer.decode(ids[: i + 1]))
            assert steps == hops[i]
            assert corpus.tokenizer.decode([targets[i]]) == answer[0], "the token that tells"


def test_a_text_has_the_tokens_of_its_parts():
    """So a model that is asked for the answer in generation reads what it was trained on."""
    said = "Now the ball is under B. It is with Anna. The result is 7. " * 20
    bpe = train_bpe([Document("prose", said)], 300)
    for name in WORD_TASKS:
        data = load_corpus(DataConfig(path=f"words:{name}", tokenizer="bytes")).train
        problem, _ = data.task.problem(5)
        for tokenizer in (byte_tokenizer(), bpe):
            both = tokenizer.encode(problem.question) + tokenizer.encode(problem.answer)
            assert tokenizer.encode(problem.question + problem.answer) == both


def test_problems_of_one_window_are_documents_of_their_own():
    corpus = load_corpus(DataConfig(path="words:swaps?held_out=0", tokenizer="bytes"))
    end = corpus.tokenizer.end_of_text_id
    batch = corpus.train.batch([0, 1], 500, documents=True)
    for ids, documents in zip(batch.tokens_BT.tolist(), batch.documents_BT.tolist(), strict=True):
        assert documents == sorted(documents)
        for i in range(2, 500):
            closed = ids[i - 1] == end and ids[i - 2] != end  # all that fill the window are one
            assert (documents[i] != documents[i - 1]) == closed
    assert not set(batch.documents_BT[0].tolist()) & set(batch.documents_BT[1].tolist())
    again = corpus.train.batch([1], 500)
    assert torch.equal(again.tokens_BT[0], batch.tokens_BT[1]), (
        "a window is a function of its number"
    )
    other = corpus.validation.batch([0, 1], 500)
    assert not torch.equal(other.tokens_BT, batch.tokens_BT), "other problems, of the same steps"


def test_accuracy_by_steps_counts_each_answer_once():
    path = "words:arithmetic?hops=2&held_out=2&modulus=3"
    corpus = load_corpus(DataConfig(path=path, tokenizer="bytes"))
    model = tiny(vocab_size=corpus.tokenizer.vocab_size, max_seq_len=300)
    found = by_hops(model, corpus.validation, 200, 4)
    assert found["answers_right_by_hops"][:2] == [None, None]
    assert all(0 <= share <= 1 for share in found["answers_right_by_hops"][2:])
    assert vocab_size(DataConfig(path=path, tokenizer="bytes")) == corpus.tokenizer.vocab_size


def test_accuracy_by_steps_is_that_of_problems_by_themselves_where_they_are_trained_so():
    path = "words:swaps?hops=2&held_out=2&each=1"
    data = load_corpus(DataConfig(path=path), byte_tokenizer()).validation
    model = tiny(vocab_size=byte_tokenizer().vocab_size, max_seq_len=300)
    seen = []
    model.register_forward_pre_hook(
        lambda _, a, k: seen.append(k["documents_BT"]), with_kwargs=True
    )
    by_hops(model, data, 200, 2, document_mask=True)
    assert torch.equal(seen[0], data.batch(data.spread(200, 2), 200, documents=True).documents_BT)
    by_hops(model, data, 200, 2)
    assert seen[1] is None


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("words:swap", {}, "did you mean 'swaps'"),
        ("words:swaps?cups=1", {}, "cups"),
        ("words:relay?hops=9", {}, "no relay comes round"),
        ("words:swaps", {}, "--init-from"),
        ("words:swaps", dict(tokenizer="bytes", validation_path="x.txt"), "its own validation"),
    ],
)
def test_what_does_not_fit_is_refused(path, settings, words):
    with pytest.raises(ValueError, match=words):
        load_corpus(DataConfig(path=path, **({"tokenizer": None} | settings)))
    if "?" not in path and "swaps" in path:
        data = load_corpus(DataConfig(path=path, tokenizer="bytes")).train
        with pytest.raises(ValueError, match="seq_len=50 is too short"):
            data.batch([0], 50)
    assert parse_word_task("words:swaps?cups=3&seed=2").cups == 3
