"""Records of what the model did: they say what the model says, and their classes and intervals are
right."""

import json
import math

import numpy as np
import pytest
import torch

from mor.analysis.branches import exits_plain
from mor.analysis.explain import explain, windows
from mor.data.tokenizer import END_OF_TEXT, byte_tokenizer, train_bpe
from mor.model.config import RouterConfig
from mor.model.loss import IGNORED
from tests.conftest import tiny

TEXT = "Größe: 12 naïve cats—日本 ate it.\n\n  The end, isn't it?"


ROUTERS = {
    "fixed": RouterConfig(),
    "expert_choice": RouterConfig(kind="expert_choice"),
    "aux_router": RouterConfig(kind="expert_choice", causal_selection="aux_router"),
    "token_choice": RouterConfig(kind="token_choice"),
    "random": RouterConfig(kind="random"),
    "from_0": RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT * 3, "the cat sat on the mat, naïvely"], 290)


def model_for(tokenizer, router="expert_choice", **settings):
    return tiny(ROUTERS[router], vocab_size=tokenizer.vocab_size, **settings)


@pytest.mark.parametrize("router", ROUTERS)
def test_records_say_what_the_model_says(tokenizer, router):
    model, ids = model_for(tokenizer, router), tokenizer.encode(TEXT)
    found = explain(model, tokenizer, TEXT)
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    logp_TV = output.logits_BTV[0].log_softmax(-1)
    assert [t.token_id for t in found.tokens] == ids
    assert [t.depth for t in found.tokens] == output.routing.depth_BT[0].tolist()
    for t, token in enumerate(found.tokens[:-1]):
        assert token.logprob == pytest.approx(float(logp_TV[t, ids[t + 1]]), abs=1e-4)
        assert token.rank == 1 + int((logp_TV[t] > logp_TV[t, ids[t + 1]]).sum())
        assert token.entropy == pytest.approx(
            -float((logp_TV[t].exp() * logp_TV[t]).sum()), abs=1e-4
        )
    assert found.tokens[-1].logprob is None and found.tokens[-1].rank is None
    assert found.nll == pytest.approx(
        -float(sum(t.logprob for t in found.tokens[:-1])) / (len(ids) - 1)
    )
    size = len(TEXT.encode()) - len(found.tokens[0].token)  # which has a character for each byte
    assert found.bits_per_byte == pytest.approx(found.nll * (len(ids) - 1) / size / math.log(2))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_exit_at_the_depth_taken_is_the_models_own_prediction(tokenizer, router):
    found = explain(model_for(tokenizer, router), tokenizer, TEXT)
    for token in found.tokens:
        steps = token.steps
        assert [s.recursion for s in steps] == [1, 2, 3] and sum(
            s.taken for s in steps
        ) == token.depth
        by_depth = {s.recursion: s.exit_logprob for s in steps}
        if token.depth:
            own = steps[token.depth - 1]
            assert own.exit_entropy == pytest.approx(token.entropy, abs=1e-4)
        if token.logprob is None:
            assert token.more is token.fewer is None
            continue
        assert by_depth.setdefault(token.depth, token.logprob) == pytest.approx(
            token.logprob, abs=1e-4
        )
        for change, other in ((token.fewer, token.depth - 1), (token.more, token.depth + 1)):
            if other == 0:  # see below
                continue
            expected = by_depth[other] - token.logprob if other in by_depth else None
            assert change == (expected if expected is None else pytest.approx(expected))


def test_no_recursion_is_a_depth_like_any_other(tokenizer):
    model, ids = model_for(tokenizer, "from_0"), tokenizer.encode(TEXT)
    found = explain(model, tokenizer, TEXT)
    depths = [t.depth for t in found.tokens]
    assert {0, 1} <= set(depths) and found.mean_depth == sum(depths) / len(ids)
    taken_RM = torch.tensor([[s.taken for s in t.steps] for t in found.tokens]).T
    without_TV = exits_plain(model, ids, taken_RM, 0).log_softmax(-1)
    for t, token in enumerate(found.tokens[:-1]):
        if token.depth == 1:
            change = float(without_TV[t, ids[t + 1]]) - token.logprob
            assert token.fewer == pytest.approx(change, abs=1e-4)
        elif token.depth == 0:
            assert token.logprob == pytest.approx(float(without_TV[t, ids[t + 1]]), abs=1e-4)
            assert token.fewer is None and token.more is not None
    groups = {name: {g.group for g in found.counterfactuals()[name]} for name in ("fewer", "more")}
    assert "0" in groups["more"] and "1" in groups["fewer"] and "0" not in groups["fewer"]
    at_least = explain(model_for(tokenizer), tokenizer, TEXT)
    assert all(t.fewer is None for t in at_least.tokens if t.depth == 1), "where all take one"


def test_scores_decide_as_the_router_did(tokenizer):
    for name in ("expert_choice", "aux_router"):
        for token in explain(model_for(tokenizer, name), tokenizer, TEXT).tokens:
            assert token.steps[0].threshold is None, "the first recursion takes everyone"
            for before, step in zip(token.steps, token.steps[1:], strict=False):
                assert (step.score is not None) == before.taken, "only tokens still in are scored"
                assert step.taken == (step.score is not None and step.score > step.threshold)
                assert (step.gate is not None) == step.taken
    for token in explain(model_for(tokenizer, "token_choice"), tokenizer, TEXT).tokens:
        scores = [s.score for s in token.steps]
        assert sum(scores) == pytest.approx(1) and token.depth == 1 + int(np.argmax(scores))
    for name in ("fixed", "random"):
        steps = [
            s for t in explain(model_for(tokenizer, name), tokenizer, TEXT).tokens for s in t.steps
        ]
        assert all(s.score is s.threshold is s.gate is None for s in steps)


def test_gates_are_those_that_weighed_the_stacks_output(tokenizer):
    model = model_for(tokenizer)
    with torch.no_grad():
        routing = model(torch.tensor([tokenizer.encode(TEXT)])).routing
    found = explain(model, tokenizer, TEXT)
    for r in range(3):
        taken = [t.steps[r].gate for t in found.tokens if t.steps[r].taken]
        assert taken == pytest.approx(routing.steps[r].gate.tolist())


def test_pieces_put_together_are_the_text_and_spans_point_into_it(tokenizer):
    found = explain(model_for(tokenizer), tokenizer, TEXT)
    assert "".join(t.piece for t in found.tokens) == TEXT
    assert all(TEXT[t.start : t.end] == t.piece for t in found.tokens)
    assert any(t.kind == "part of a character" for t in found.tokens)


def test_special_tokens_in_the_text_shift_no_span_and_have_no_bytes(tokenizer):
    text = f"One é {END_OF_TEXT}Two"
    found = explain(model_for(tokenizer), tokenizer, text)
    assert "".join(t.piece for t in found.tokens) == text
    special = next(t for t in found.tokens if t.kind == "special")
    assert text[special.start : special.end] == special.piece == END_OF_TEXT
    size = len("One é Two".encode()) - len(found.tokens[0].piece.encode())
    assert found.bits_per_byte == pytest.approx(
        found.nll * (len(found.tokens) - 1) / size / math.log(2)
    )


def test_a_long_text_is_read_in_windows_and_every_token_as_in_the_one_with_most_context(tokenizer):
    assert list(windows(10, 4)) == [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert list(windows(4, 4)) == [(0, 0, 4)] and list(windows(5, 4)) == [(0, 0, 4), (2, 4, 5)]
    model, ids = model_for(tokenizer), tokenizer.encode(TEXT)
    found = explain(model, tokenizer, TEXT, window=9)
    with torch.no_grad():
        for start, first, stop in windows(len(ids), 9):
            output = model(torch.tensor([ids[start:stop]]))
            for t in range(first, stop):
                assert found.tokens[t].depth == int(output.routing.depth_BT[0, t - start])
                assert found.tokens[t].position == t - start
    assert sum(t.logprob is None for t in found.tokens) == 1, (
        "the token after a window's end is known"
    )


def test_tidy_rows_and_plain_values(tokenizer):
    found = explain(model_for(tokenizer), tokenizer, TEXT, name="a")
    rows = found.records()
    assert len(rows) == 3 * len(found.tokens) and len({frozenset(row) for row in rows}) == 1
    assert (
        rows[4]["index"] == 1
        and rows[4]["recursion"] == 2
        and isinstance(rows[4]["exit_guess"], str)
    )
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["summary"]["causal"] is True and plain["tokens"][3]["steps"][0]["exit_guesses"]
    assert sum(f["tokens"] for f in plain["flow"] if f["recursion"] == 1) == len(found.tokens)


def test_counts_may_come_from_a_corpus(tokenizer):
    ids = tokenizer.encode(TEXT)
    found = explain(model_for(tokenizer), tokenizer, TEXT, counts={ids[0]: 77})
    assert found.tokens[0].count == 77 and found.tokens[1].count == 0


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("", {}, "text is empty"),
        ("abc", dict(window=65), "2..64"),
        ("abc", dict(window=1), "window must lie"),
    ],
)
def test_bad_input_is_refused(tokenizer, text, settings, words):
    with pytest.raises(ValueError, match=words):
        explain(model_for(tokenizer), tokenizer, text, **settings)


def test_answers_of_a_task_stand_in_place_of_next_tokens(tokenizer):
    model, ids = model_for(tokenizer), tokenizer.encode(TEXT)
    answers = [IGNORED if t % 3 else (7 * t) % 50 for t in range(len(ids))]
    found, plain = (explain(model, tokenizer, TEXT, window=9, answers=a) for a in (answers, None))
    assert (found.asked, plain.asked, found.bits_per_byte) == ("answer", "next token", None)
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids[:9]])).logits_BTV[0].log_softmax(-1)
    for t, (token, same) in enumerate(zip(found.tokens, plain.tokens, strict=True)):
        assert (token.depth, token.entropy, same.target_id) == (
            same.depth,
            same.entropy,
            [*ids[1:], None][t],
        )
        if answers[t] == IGNORED:
            assert (
                token.target_id
                is token.target
                is token.logprob
                is token.rank
                is token.more
                is token.fewer
                is None
            )
        elif t < 9:
            assert token.logprob == pytest.approx(float(logp_TV[t, answers[t]]), abs=1e-4)
            assert token.rank == 1 + int((logp_TV[t] > logp_TV[t, answers[t]]).sum())
            assert token.steps[token.depth - 1].exit_logprob == pytest.approx(
                token.logprob, abs=1e-4
            )
    with pytest.raises(ValueError, match="give one for each"):
        explain(model, tokenizer, TEXT, answers=answers[:-1])


def test_a_vanilla_model_and_a_single_token_are_explained_too(tokenizer):
    found = explain(model_for(tokenizer, "fixed", num_recursions=1), tokenizer, "a")
    assert (len(found.tokens), found.nll, found.bits_per_byte) == (1, None, None)
    assert found.tokens[0].depth == 1 and len(found.records()) == 1 and found.flow() == []
    assert found.counterfactuals() == {"fewer": [], "more": []}


@pytest.mark.gpu
def test_a_gpu_gives_the_same_records(tokenizer):
    for router in ROUTERS:
        model = model_for(tokenizer, router)
        here, there = explain(model, tokenizer, TEXT), explain(model.cuda(), tokenizer, TEXT)
        for a, b in zip(here.tokens, there.tokens, strict=True):
            assert a.depth == b.depth and a.entropy == pytest.approx(b.entropy, abs=1e-3)
            for x, y in zip(a.steps, b.steps, strict=True):
                assert x.exit_entropy == pytest.approx(y.exit_entropy, abs=1e-3)


def test_a_text_is_explained_at_a_depth():
    """Depths, logits and thresholds are those of the budget, which may lie beyond the trained
    recursions."""
    from mor.model.budget import budget_of, router_for
    from tests.budgets import calibrated

    model, tokenizer = calibrated("expert", "hybrid", vocab_size=257).eval(), byte_tokenizer()
    text = "the state is 3"
    found = explain(model, tokenizer, text, depth=1.6)
    ids = torch.tensor([tokenizer.encode(text)])
    routing = model(ids, router=router_for(model, 1.6)).routing
    assert [token.depth for token in found.tokens] == routing.depth_BT[0].tolist()
    assert all(len(token.steps) == 3 for token in found.tokens)
    threshold = torch.tensor(budget_of(model, 1.6).thresholds[0]).sigmoid()
    assert found.tokens[0].steps[1].threshold == pytest.approx(float(threshold))
    assert {token.depth for token in explain(model, tokenizer, text, depth="full").tokens} == {3}
    beyond = explain(model, tokenizer, text, depth=4.3)
    with torch.no_grad():
        output = model(ids, router=router_for(model, 4.3))
    assert [token.depth for token in beyond.tokens] == output.routing.depth_BT[0].tolist()
    assert {len(token.steps) for token in beyond.tokens} == {5} == {beyond.model["num_recursions"]}
    for token, logp in zip(beyond.tokens[:-1], output.logits_BTV[0].log_softmax(-1), strict=False):
        assert token.logprob == pytest.approx(float(logp[token.target_id]), abs=1e-4)


@pytest.mark.parametrize("router", ["expert", pytest.param("token", marks=pytest.mark.slow)])
def test_other_depths_of_the_same_text_are_recorded_as_those_budgets_read_it(router):
    """Also of a text longer than the window."""
    from tests.budgets import calibrated

    model, tokenizer = calibrated(router, vocab_size=257).eval(), byte_tokenizer()
    asked = [1.6, "full", 4.3]
    found = explain(model, tokenizer, TEXT, window=20, depths=asked)
    assert [at.asked for at in found.budgets] == asked and len(found.tokens) > 40
    for at in found.budgets:
        alone = explain(model, tokenizer, TEXT, window=20, depth=at.asked)
        assert at.depth == [token.depth for token in alone.tokens]
        for ours, token in zip(at.logprob, alone.tokens, strict=True):
            assert (ours is None) == (token.logprob is None)
            assert ours is None or ours == pytest.approx(token.logprob, abs=1e-4)
        assert (at.mean_depth, at.nll) == pytest.approx((alone.mean_depth, alone.nll), abs=1e-4)
    with pytest.raises(ValueError, match="cannot be had"):
        explain(model, tokenizer, TEXT, depths=[9])
