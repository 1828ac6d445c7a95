"""Problems of known depth: right answers, one problem per number, loss on answers only."""

import pytest
import torch

from mor.data import DataConfig, DataState, load_corpus
from mor.evaluate import by_hops, evaluate
from mor.loss import IGNORED

PATH = "task:pointer-chasing?nodes=6&hops=4"


def corpus(path=PATH):
    return load_corpus(DataConfig(path=path))


def solve(text):
    """Answers of a problem, by reading it as a person would: an independent definition."""
    words = text.split()
    after = dict(word.split(">") for word in words if ">" in word)
    answers = []
    for i, word in enumerate(words):
        if word.startswith("+"):
            node = words[i + 1]
            for _ in range(int(word[1:])):
                node = after[node]
            answers.append(node)
            assert len(words) == i + 2 or words[i + 2] == node
    return answers, after


def test_every_answer_is_right_and_only_answers_have_targets():
    found = corpus()
    batch = found.validation.batch(range(20), 41)
    _, hops_BT = found.validation.problems(range(20), 41)
    for row in range(20):
        answers, after = solve(found.tokenizer.decode(batch.tokens_BT[row].tolist()))
        asked = batch.targets_BT[row] != IGNORED
        assert [found.tokenizer.decode([t]) for t in batch.targets_BT[row][asked].tolist()] == answers
        assert sorted(after) == sorted(after.values()) == list("abcdef")
        node, seen = "a", set()
        while node not in seen:
            seen.add(node)
            node = after[node]
        assert len(seen) == 6, "one cycle through all nodes, so that no query of few hops comes round"
        assert torch.equal(asked, hops_BT[row] > 0)
    assert set(hops_BT[hops_BT > 0].tolist()) == {1, 2, 3, 4}


def test_a_problem_depends_on_its_number_and_the_seed_alone():
    data, other = corpus().train, corpus(f"{PATH}&seed=1").train
    together, alone = data.batch([3, 900_000], 30), data.batch([900_000], 30)
    assert torch.equal(together.tokens_BT[1:], alone.tokens_BT)
    assert not torch.equal(together.tokens_BT[0], together.tokens_BT[1])
    assert not torch.equal(other.batch([3], 30).tokens_BT, together.tokens_BT[:1])
    first = next(data.batches(4, 30, seed=0, state=DataState()))[0]
    again = next(data.batches(4, 30, seed=0, state=DataState()))[0]
    assert torch.equal(first.tokens_BT, again.tokens_BT)


def test_training_holds_no_validation_problem():
    found = corpus()
    held_out = {tuple(row) for row in found.validation.batch(range(512), 41).tokens_BT.tolist()}
    seen = {tuple(row) for row in found.train.batch(range(4096), 41).tokens_BT.tolist()}
    assert len(held_out) == 512 and len(seen) == 4096 and not held_out & seen


def test_evaluation_counts_answers_only_and_hops_add_up_to_it():
    from mor.config import preset
    from mor.model import Transformer

    found = corpus()
    model = Transformer(preset("tiny", vocab_size=found.tokenizer.vocab_size)).init_weights().eval()
    result = evaluate(model, found.validation, seq_len=30, max_windows=20)
    batch = found.validation.batch([i * 512 // 20 for i in range(20)], 30)
    logits = model(batch.tokens_BT).logits_BTV
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORED)
    assert abs(result.nll - expected) < 1e-5
    scores = by_hops(model, found.validation, 30, 16)
    first = found.validation.batch(range(16), 30)
    right = (model(first.tokens_BT).logits_BTV.argmax(-1) == first.targets_BT)[first.targets_BT != IGNORED]
    assert abs(scores["answers_right"] - right.float().mean()) < 1e-6
    assert len(scores["answers_right_by_hops"]) == 4 and scores["mean_depth_by_hops"] == [1.0] * 5


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("task:sorting", "no task 'sorting'"),
        ("task:pointer-chasing?nodes=six", "whole numbers"),
        ("task:pointer-chasing?node=6", "did you mean 'nodes'"),
        ("task:pointer-chasing?nodes=4&hops=4", "no query comes round"),
        ("task:pointer-chasing?nodes=40", "2..26"),
    ],
)
def test_a_wrong_task_is_explained(path, message):
    with pytest.raises(ValueError, match=message):
        corpus(path)


def test_a_sequence_without_room_for_a_query_is_refused():
    with pytest.raises(ValueError, match="seq_len=8 is too short"):
        corpus().train.batch([0], 8)
