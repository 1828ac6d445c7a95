"""Analyses over a corpus: each equals its definition, worked out another way."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mor.analysis import corpus
from mor.analysis.branches import exits_plain
from mor.data.corpus import tokenize
from mor.data.sources import Document
from mor.data.tokenizer import byte_tokenizer
from mor.evaluation.nll import evaluate
from mor.model.config import RouterConfig
from mor.model.loss import IGNORED
from mor.model.other_depths import RepeatLastRouter
from tests.analysis.small_corpus import TEXT, WINDOW
from tests.conftest import tiny

FROM_0 = RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1))


@pytest.fixture(scope="module")
def data():
    documents = [Document(str(i), f"{i}: {TEXT[i:]}{TEXT[: 2 * i]}") for i in range(6)]
    return tokenize(documents, byte_tokenizer())


def model_for(router="expert_choice", **settings):
    return tiny(router, vocab_size=257, **settings)


def reading_of(data, router="expert_choice", *, windows=5, **settings):
    return corpus.read(model_for(router, **settings), data, seq_len=WINDOW, max_windows=windows)


def test_windows_lie_evenly_and_are_read_causally(data):
    reading = reading_of(data)
    assert reading.tokens_BT.shape == (5, WINDOW) and data.num_windows(WINDOW) > 10
    assert torch.equal(reading.tokens_BT[:, 1:], reading.targets_BT[:, :-1])
    with torch.no_grad():
        assert torch.equal(reading.depth_BT, reading.model(reading.tokens_BT).routing.depth_BT)
    for length, words in ((len(data), "lower seq_len"), (len(data) + 1, "the model's max_seq_len")):
        with pytest.raises(ValueError, match=words):
            corpus.read(model_for(max_seq_len=len(data)), data, seq_len=length)


def test_tokens_without_recursions_have_a_bar_of_their_own(data):
    reading = reading_of(data, router=FROM_0)
    depths = reading.depth_BT.flatten().tolist()
    rows = corpus.depth_histogram(reading)
    assert [(r["depth"], r["tokens"]) for r in rows] == [(d, depths.count(d)) for d in range(4)]
    assert depths.count(0) > 0 and sum(r["share"] for r in rows) == pytest.approx(1)


def test_depth_histogram_and_dead_tokens_count_what_was_taken(data):
    reading = reading_of(data)
    depths = reading.depth_BT.flatten().tolist()
    rows = corpus.depth_histogram(reading)
    assert [(r["depth"], r["tokens"]) for r in rows] == [(d, depths.count(d)) for d in (1, 2, 3)]
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    for r in corpus.dead_tokens(reading):
        took_BT = reading.depth_BT >= r["recursion"]  # expert-choice: who is out stays out
        assert r["dead_positions"] == pytest.approx(
            sum(not column.any() for column in took_BT.T) / WINDOW
        )
        seen = reading.tokens_BT.flatten().tolist()
        common = {i for i in seen if seen.count(i) >= 5}
        dead = common - set(reading.tokens_BT[took_BT].tolist())
        assert r["types"] == len(common) and r["dead_types"] == pytest.approx(
            len(dead) / len(common)
        )


def test_a_lookup_table_knows_depths_that_the_token_or_the_position_decides():
    mixed = [
        torch.randperm(WINDOW, generator=torch.Generator().manual_seed(seed)) for seed in range(6)
    ]
    tokens_BT, place_BT = torch.stack(mixed), torch.arange(WINDOW).expand(6, -1)

    def explained(depth_BT):
        rows = corpus.depth_predictors(SimpleNamespace(tokens_BT=tokens_BT, depth_BT=depth_BT))
        return {row["predictor"]: row["explained"] for row in rows}

    for decides, depth_BT in (("token", 1 + tokens_BT % 3), ("position", 1 + place_BT % 3)):
        found = explained(depth_BT)
        assert found.pop(decides) == pytest.approx(1) and max(found.values()) < 0.5
    assert explained(torch.ones(6, WINDOW)) == {}, "nothing to explain"
    tokens_BT = tokens_BT[:, :1]
    assert explained(torch.ones(6, 1)) == {}, "no token has another before it"


@pytest.mark.parametrize("causal_selection", ["aux_loss", "aux_router"])
def test_agreement_is_that_of_the_training_log_split_by_recursion(data, causal_selection):
    router = RouterConfig(kind="expert_choice", causal_selection=causal_selection)
    reading = reading_of(data, router)
    rows = corpus.agreement(reading)
    assert [r["recursion"] for r in rows] == [2, 3]
    with torch.no_grad():
        top = [reading.model(t, selection="topk").routing for t in reading.tokens_BT.split(1)]
    total = sum(r["same_decision"] * r["candidates"] for r in rows) / sum(
        r["candidates"] for r in rows
    )
    assert total == pytest.approx(reading.model.router.health(top)["agreement"])
    depth_BT = torch.cat([t.depth_BT for t in top])
    assert rows[0]["same_depth"] == pytest.approx(
        float((depth_BT == reading.depth_BT).float().mean())
    )
    assert rows[0]["share_topk_non_causal"] == pytest.approx(int(WINDOW * 2 / 3) / WINDOW)
    assert corpus.agreement(reading_of(data, "token_choice")) == []


def test_score_histograms_hold_every_scored_token_on_its_side_of_the_threshold(data):
    reading = reading_of(data)
    rows = corpus.score_histogram(reading)
    for recursion in (2, 3):
        own = [r for r in rows if r["recursion"] == recursion]
        assert sum(r["tokens"] for r in own) == int((reading.depth_BT >= recursion - 1).sum())
        assert sum(r["tokens"] for r in own if r["taken"]) == int(
            (reading.depth_BT >= recursion).sum()
        )
        assert all(r["tokens"] == 0 for r in own if r["taken"] != (r["low"] >= 0.5 - 1e-9))
    chosen = [r for r in corpus.score_histogram(reading_of(data, "token_choice")) if r["taken"]]
    assert sum(r["tokens"] for r in chosen) == 5 * WINDOW
    assert corpus.score_histogram(reading_of(data, "random")) == []


def test_separation_is_the_share_of_scores_near_0_or_1():
    rows = [
        dict(recursion=2, taken=low > 0.4, low=low / 10, high=low / 10 + 0.1, tokens=n)
        for low, n in ((0, 3), (5, 2), (9, 5))
    ]
    (found,) = corpus.separation(rows)
    assert (found["scored"], found["near_0"], found["near_1"], found["binary"]) == (
        10,
        0.3,
        0.5,
        0.8,
    )


def test_drift_compares_the_states_that_capped_models_end_with(data):
    reading = reading_of(data)
    ends = []
    hook = reading.model.recursions.register_forward_hook(
        lambda module, inputs, out: ends.extend([inputs[0], out[0]])
    )
    with torch.no_grad():
        for cap in (1, 2, 3):
            reading.model(reading.tokens_BT, max_depth=cap)
    hook.remove()
    states, depth = [ends[0], ends[1], ends[3], ends[5]], reading.depth_BT.flatten()
    rows = corpus.drift(reading)
    assert [(r["earlier"], r["later"]) for r in rows] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
        (2, 3),
    ]
    for row in rows:
        x, y = (states[row[name]][depth >= row["later"]] for name in ("earlier", "later"))
        assert row["tokens"] == len(x)
        cosine = ((x * y).sum(1) / x.norm(dim=1) / y.norm(dim=1)).mean()
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-5)
        assert row["relative_change"] == pytest.approx(
            float(((y - x).norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-4
        )


@pytest.mark.parametrize("kv", ["recursion_wise", "hybrid"])
def test_kv_similarity_pairs_the_entries_of_the_same_token(data, kv):
    reading = reading_of(data, kv_strategy=kv)
    rows = corpus.kv_similarity(reading)
    assert {(r["earlier"], r["later"]) for r in rows} == {(1, 2), (1, 3), (2, 3)}
    row, cosines = rows[-1], []
    a, b, layer = row["earlier"], row["later"], row["layer"]
    for cache in reading.caches:
        one, two = cache.streams[a], cache.streams[b]
        places = {int(p): s for s, p in enumerate(one.position_BS[0][: int(one.length)])}
        for s, p in enumerate(two.position_BS[0][: int(two.length)].tolist()):
            x, y = one.v[layer][0, places[p]], two.v[layer][0, s]
            cosines += [
                float(torch.dot(g, h) / g.norm() / h.norm()) for g, h in zip(x, y, strict=True)
            ]
    assert row["tokens"] == len(cosines) / 2  # two key/value heads
    assert row["cosine_values"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_shared_entries_leave_nothing_to_compare(data):
    assert corpus.kv_similarity(reading_of(data, kv_strategy="shared")) == []


@pytest.mark.parametrize("kind", ["fixed", "expert_choice", "token_choice", "random"])
def test_depth_scaling_is_evaluation_at_every_cap_and_labels_what_was_never_trained(data, kind):
    model = model_for(kind)
    rows = corpus.depth_scaling(model, data, seq_len=WINDOW, max_windows=4)
    assert [(r["max_depth"], r["extrapolated"]) for r in rows] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 1),
        (5, 1),
    ]
    for row in rows:
        cap = row["max_depth"]
        router = model.router if cap <= 3 else RepeatLastRouter(model.router, cap)
        settings = dict(seq_len=WINDOW, max_windows=4, max_depth=cap)
        found = evaluate(model, data, router=router, **settings)
        assert (row["nll"], row["mean_depth"]) == (found.nll, found.mean_depth)
    masked = corpus.depth_scaling(model, data, seq_len=WINDOW, document_mask=True)
    expected = evaluate(model, data, seq_len=WINDOW, max_depth=2, document_mask=True)
    assert masked[1]["nll"] == expected.nll
    assert len({round(r["nll"], 6) for r in rows}) == 5, "every further recursion changes something"


@pytest.mark.parametrize(
    "asked", ["everywhere", pytest.param("at a third", marks=pytest.mark.slow), "from depth 0"]
)
def test_counterfactual_gains_are_means_of_one_run_per_token(data, asked):
    router = {"router": FROM_0} if asked == "from depth 0" else {}
    reading = reading_of(data, windows=2, **router)
    least = reading.model.config.least_depth
    if asked == "at a third":
        nothing = torch.arange(WINDOW) % 3 > 0
        reading = replace(reading, targets_BT=reading.targets_BT.masked_fill(nothing, IGNORED))
    changes: dict = {}
    for w, routing in enumerate(reading.routings):
        ids, depths = reading.tokens_BT[w].tolist(), routing.depth_BT[0].tolist()
        logp = {
            d: exits_plain(reading.model, ids, routing.taken_RM, d).log_softmax(-1)
            for d in range(least, 4)
        }
        for t, depth in enumerate(depths):
            target = int(reading.targets_BT[w, t])
            for name, other in (("fewer", depth - 1), ("more", depth + 1)):
                if other in logp and target != IGNORED:
                    change = float(logp[other][t, target] - logp[depth][t, target])
                    changes.setdefault((name, depth), []).append(change)
    rows = corpus.counterfactual_gains(reading)
    assert {(r["change"], r["depth"]) for r in rows} == changes.keys()
    for row in rows:
        expected = changes[row["change"], row["depth"]]
        assert row["count"] == len(expected)
        assert row["mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        assert row["better"] == pytest.approx(
            sum(x > 0 for x in expected) / len(expected), abs=0.02
        )
        assert row["low"] is None or row["low"] <= row["mean"] <= row["high"]


def test_depth_by_class_covers_every_token_once_per_grouping(data):
    reading = reading_of(data)
    rows = corpus.depth_by_token_class(reading, byte_tokenizer())
    for by in ("kind", "position", "frequency"):
        own = [r for r in rows if r["by"] == by]
        assert sum(r["count"] for r in own) == 5 * WINDOW
        mean = sum(r["mean"] * r["count"] for r in own) / (5 * WINDOW)
        assert mean == pytest.approx(float(reading.depth_BT.float().mean()))
    assert {"word start", "digit", "punctuation"} <= {r["group"] for r in rows}


def test_tokens_are_counted_over_all_of_the_data(data):
    counts = corpus.token_counts(data, chunk=7)
    whole = data.tokens(0, len(data)).tolist()
    assert counts == {i: whole.count(i) for i in set(whole)}
