"""Problems of known depth: right answers, one problem per number, loss on answers only."""

import pytest
import torch
from rich.console import Console

from mor import checkpoint
from mor.data.config import DataConfig
from mor.data.corpus import load_corpus
from mor.data.problems import StateTracking, parse_task
from mor.data.stream import DataState
from mor.evaluation.nll import by_hops, evaluate
from mor.model.config import RouterConfig, preset
from mor.model.loss import IGNORED
from mor.model.transformer import Transformer
from mor.training.config import TrainConfig
from mor.training.loop import train

PATHS = ["task:pointer-chasing?nodes=6&hops=4", "task:state-tracking?states=4&moves=3&hops=4"]


def corpus(path=PATHS[1]):
    return load_corpus(DataConfig(path=path))


def chase(words):
    """{index of the asking word: (answer, hops)}, by reading the text as a person would."""
    after = dict(word.split(">") for word in words if ">" in word)
    node, seen = "a", set()
    while node not in seen:
        seen.add(node)
        node = after[node]
    assert len(seen) == 6, "one cycle through all nodes, so that no query of few hops comes round"
    found = {}
    for i, word in enumerate(words):
        if word.startswith("+") and i + 1 < len(words):
            node = words[i + 1]
            for _ in range(int(word[1:])):
                node = after[node]
            found[i + 1] = node, int(word[1:])
            assert i + 2 == len(words) or words[i + 2] == node, "the answer follows"
    return found


def track(words):
    """The same for a state that is set and moved."""
    after = StateTracking(states=4, moves=3).permutations().tolist()
    assert (
        all(sorted(row) == [0, 1, 2, 3] for row in after)
        and len({tuple(row) for row in after}) == 3
    )
    found, state, hops = {}, None, None
    for i, word in enumerate(words):
        state, hops = (
            (int(word[1:]), 1) if word[0] == "=" else (after[int(word[1:])][state], hops + 1)
        )
        found[i] = str(state), hops
    return found


@pytest.mark.parametrize(("path", "solve"), list(zip(PATHS, [chase, track], strict=True)))
def test_every_answer_is_right_and_only_answers_have_targets(path, solve):
    found = corpus(path)
    problems = found.validation.problems(range(40), 28)
    batch = found.validation.batch(range(40), 28)
    assert torch.equal(batch.tokens_BT, problems.tokens_BT) and torch.equal(
        batch.targets_BT, problems.targets_BT
    )
    hops = set()
    for tokens, targets, asked_hops in zip(*(x.tolist() for x in problems), strict=True):
        assert parse_task(path).answers(tokens) == targets, "also worked out from the text alone"
        padding = next(i for i, token in enumerate(tokens) if token)
        expected = solve(found.tokenizer.decode(tokens).split())
        for i in range(28):
            answer, count = expected.get(i - padding, (None, 0))
            assert asked_hops[i] == count
            assert targets[i] == (IGNORED if answer is None else found.tokenizer.encode(answer)[0])
        hops |= {count for _, count in expected.values()}
    assert hops == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("path", "text", "answers"),
    [
        (PATHS[0], "+1 a a>b b>c +2 a +1 c +3 a +1 +1 b", [None] * 5 + ["c"] + [None] * 6 + ["c"]),
        (PATHS[1], "p0 =3 2 p1 =1 =0", [None, "3", None, None, "1", "0"]),
    ],
)
def test_a_text_that_is_no_problem_has_answers_where_they_are_known(path, text, answers):
    tokenizer = corpus(path).tokenizer
    found = parse_task(path).answers(tokenizer.encode(text))
    assert found == [IGNORED if word is None else tokenizer.encode(word)[0] for word in answers]


@pytest.mark.parametrize("path", PATHS)
def test_a_problem_depends_on_its_number_and_the_seed_alone(path):
    data, other = corpus(path).train, corpus(f"{path}&seed=1").train
    together, alone = data.batch([3, 900_000], 30), data.batch([900_000], 30)
    assert torch.equal(together.tokens_BT[1:], alone.tokens_BT)
    assert not torch.equal(together.tokens_BT[0], together.tokens_BT[1])
    assert not torch.equal(other.batch([3], 30).tokens_BT, together.tokens_BT[:1])
    first, again = (next(data.batches(4, 30, seed=0, state=DataState()))[0] for _ in range(2))
    assert torch.equal(first.tokens_BT, again.tokens_BT)


@pytest.mark.parametrize("path", PATHS)
def test_training_holds_no_validation_problem(path):
    found = corpus(path)
    held_out = {tuple(row) for row in found.validation.batch(range(512), 41).tokens_BT.tolist()}
    seen = {tuple(row) for row in found.train.batch(range(4096), 41).tokens_BT.tolist()}
    assert len(held_out) == 512 and len(seen) == 4096 and not held_out & seen


def test_evaluation_counts_answers_only_and_hops_add_up_to_it():
    found = corpus()
    model = Transformer(preset("tiny", vocab_size=found.tokenizer.vocab_size)).init_weights().eval()
    result = evaluate(model, found.validation, seq_len=30, max_windows=20)
    batch = found.validation.batch([i * 512 // 20 for i in range(20)], 30)
    logits = model(batch.tokens_BT).logits_BTV
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORED
    )
    assert abs(result.nll - expected) < 1e-5
    scores = by_hops(model, found.validation, 30, 16)
    first = found.validation.batch(range(0, 512, 32), 30)
    right = (model(first.tokens_BT).logits_BTV.argmax(-1) == first.targets_BT)[
        first.targets_BT != IGNORED
    ]
    assert abs(scores["answers_right"] - right.float().mean()) < 1e-6
    assert len(scores["answers_right_by_hops"]) == 4 and scores["mean_depth_by_hops"] == [
        None,
        1.0,
        1.0,
        1.0,
        1.0,
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("task:sorting", "no task 'sorting'"),
        ("task:pointer-chasing?nodes=six", "whole numbers"),
        ("task:pointer-chasing?node=6", "did you mean 'nodes'"),
        ("task:pointer-chasing?nodes=4&hops=4", "no query comes round"),
        ("task:pointer-chasing?nodes=40", "nodes must be at most 26, got 40"),
        ("task:state-tracking?states=1", "states must be at least 2, got 1"),
    ],
)
def test_a_wrong_task_is_explained(path, message):
    with pytest.raises(ValueError, match=message):
        corpus(path)


def test_a_sequence_without_room_for_a_question_is_refused():
    with pytest.raises(ValueError, match="seq_len=8 is too short"):
        corpus(PATHS[0]).train.batch([0], 8)


def test_training_tells_the_frequency_router_how_often_words_occur(tmp_path):
    router = RouterConfig(kind="frequency")
    model = preset("tiny", num_recursions=2, router=router, num_layers=4)
    config = TrainConfig(
        model=model,
        data=DataConfig(path=PATHS[1]),
        out=str(tmp_path),
        steps=1,
        batch_size=2,
        seq_len=16,
    )
    trained = train(config, console=Console(quiet=True))
    loaded = checkpoint.load(trained.path).model.router
    count = trained.corpus.train.token_counts(loaded.need_V.numel(), 16)
    order = count.argsort(descending=True, stable=True)
    assert (loaded.need_V[order].diff() >= 0).all() and count.unique().numel() > 2


def test_runs_of_moves_are_of_all_lengths_equally_often():
    problems = load_corpus(DataConfig(path="task:state-tracking?hops=4")).train.problems(
        range(400), 40
    )
    hops = problems.hops_BT[:, :-1]
    ends = problems.hops_BT[:, 1:] == 1  # the next word sets the state anew
    share = torch.bincount(hops[ends], minlength=5)[1:] / ends.sum()
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_a_setting_is_given_once():
    with pytest.raises(ValueError, match="hops is given twice"):
        parse_task("task:state-tracking?hops=16&moves=2&hops=3")
    assert parse_task("task:state-tracking?hops=3&moves=2") == StateTracking(hops=3, moves=2)
