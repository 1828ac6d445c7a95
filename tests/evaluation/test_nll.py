"""Evaluation against its definition: what every token costs, seen from the tokens before it in its
window, over the bytes of exactly these tokens."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mor import device
from mor.data.corpus import tokenize
from mor.data.problems import parse_task
from mor.data.sources import Document
from mor.data.stream import Part, TaskData, TokenData
from mor.data.text_bytes import TextBytes
from mor.data.tokenizer import train_bpe
from mor.evaluation.nll import by_hops, evaluate, leak
from mor.evaluation.score import Score
from mor.model.config import RouterConfig
from mor.model.transformer import Transformer
from mor.training.loop import train
from tests.conftest import random_tokens, tiny
from tests.training.small_run import quiet, settings

TOKENS = random_tokens(104)
SIZES = np.random.default_rng(0).integers(0, 13, (2, 37))
DATA = TokenData(
    [Part(TOKENS.numpy(), np.array([30, 71, 104]))], 3, 250, TextBytes(*SIZES, SIZES[1], 36)
)
WINDOW = 9  # 11 windows, then one of 4 tokens


def cost_of_each_token(model, *, windows, **settings):
    """Nats, one window at a time, from the logits."""
    found = []
    for i in windows:
        ids = TOKENS[i * WINDOW : (i + 1) * WINDOW + 1]
        logits = model(ids[None, :-1], **settings).logits_BTV[0]
        found.append(F.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(found)


def bytes_in(windows):
    places = [p for i in windows for p in range(i * WINDOW + 1, (i + 1) * WINDOW + 1) if p < 104]
    return sum(int(SIZES[int(TOKENS[p - 1] != 36), TOKENS[p]]) for p in places)


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice", "random"])
@pytest.mark.parametrize("max_depth", [1, 2, 3])
@torch.inference_mode()
def test_every_figure_is_what_its_definition_gives(router, max_depth):
    model = tiny(router)
    for selection in ("threshold", "topk"):
        found = evaluate(
            model, DATA, seq_len=WINDOW, batch_size=4, max_depth=max_depth, selection=selection
        )
        nats = cost_of_each_token(
            model, windows=range(12), max_depth=max_depth, selection=selection
        )
        assert found.tokens == len(nats) == 103 and found.max_depth == max_depth
        assert found.nll == pytest.approx(nats.mean().item(), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(found.nll))
        in_bits = nats.sum().item() / math.log(2)
        assert found.bits_per_byte == pytest.approx(in_bits / bytes_in(range(12)), rel=1e-5)
        assert found.causal == (selection == "threshold" or router in ("fixed", "token_choice"))
        assert len(found.share_per_recursion) == max_depth and found.share_per_recursion[0] == 1
        assert found.mean_depth == pytest.approx(sum(found.share_per_recursion))


@torch.inference_mode()
def test_a_share_of_the_windows_is_spread_evenly_and_divided_by_its_own_bytes():
    model, windows = tiny(), [0, 3, 6, 9]
    nats = cost_of_each_token(model, windows=windows)
    found = evaluate(model, DATA, seq_len=WINDOW, batch_size=3, max_windows=4)
    assert found.score.bytes == bytes_in(windows) and found.tokens == 36
    assert found.bits_per_byte == pytest.approx(
        nats.sum().item() / math.log(2) / bytes_in(windows), rel=1e-5
    )
    one_by_one = (evaluate(model, part, seq_len=WINDOW).score for part in parts_of(DATA, windows))
    together = sum(one_by_one, Score())
    assert together.nll == pytest.approx(found.nll, rel=1e-5)
    assert (together.tokens, together.bytes) == (found.score.tokens, found.score.bytes)


def parts_of(data, windows):
    for i in windows:
        ids = data.tokens(i * WINDOW, (i + 1) * WINDOW + 1).numpy()
        yield TokenData([Part(ids, np.array([len(ids)]))], 1, 1, data.bytes_by_token)


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_bits_per_byte_is_that_of_one_window_for_every_token(seed):
    """Text of characters of 1 to 4 bytes and tokens of 1 to many, any length, any window."""
    draw = random.Random(seed)
    words = ["a", "The ", "naïve ", "日本語", "🙂", "e", "\n", "Größe "]
    texts = ["".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(4)]
    tokenizer = train_bpe([" ".join(words) * 9], 257 + 20)
    data = tokenize([Document(str(i), text) for i, text in enumerate(texts)], tokenizer)
    ids, window = data.tokens(0, len(data)), draw.randint(1, 13)
    model = tiny(draw.choice(["fixed", "expert_choice"]), vocab_size=tokenizer.vocab_size)
    nats = 0.0
    for place in range(1, len(ids)):
        start = (place - 1) // window * window
        logits = model(ids[None, start:place]).logits_BTV[0, -1].double()
        nats -= float(logits.log_softmax(0)[ids[place]])
    first = tokenizer.backend.id_to_token(int(ids[0]))  # a character for each byte
    size = sum(len(text.encode()) for text in texts) - len(first)
    found = evaluate(model, data, seq_len=window, batch_size=draw.randint(1, 5))
    assert found.score.tokens == len(ids) - 1 and found.score.bytes == size
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@torch.inference_mode()
def test_text_shorter_than_a_window_is_scored():
    model, short = tiny(), next(parts_of(DATA, [11]))
    assert len(short) == 5
    found = evaluate(model, short, seq_len=64)
    nats = cost_of_each_token(model, windows=[11])
    assert found.nll == pytest.approx(nats.mean().item(), rel=1e-5) and found.tokens == 4


@torch.inference_mode()
def test_documents_are_masked_from_each_other_in_the_shorter_window_too():
    model = tiny()
    found = evaluate(model, DATA, seq_len=50, document_mask=True)
    nats = 0.0  # an end of text is the beginning of the document after it
    for a, b in ((0, 29), (29, 50), (50, 70), (70, 100), (100, 103)):
        logits = model(TOKENS[None, a:b]).logits_BTV[0]
        nats += F.cross_entropy(logits, TOKENS[a + 1 : b + 1], reduction="sum").item()
    assert found.score.nats == pytest.approx(nats, rel=1e-5)


def test_the_leak_is_what_topk_gains():
    topk, causal = leak(tiny(RouterConfig(kind="expert_choice", alpha=1.0)), DATA, seq_len=9)
    assert topk.leak_nats == pytest.approx(causal.nll - topk.nll) and abs(topk.leak_nats) > 1e-3
    assert not topk.causal and causal.causal and causal.leak_nats is None


def test_answers_of_a_task_have_no_bytes():
    data = TaskData(parse_task("task:state-tracking?hops=3"), 0, 8)
    found = evaluate(tiny(vocab_size=15), data, seq_len=16)
    assert found.bits_per_byte is None and found.score.tokens == 8 * 16


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seq_len": 65}, r"1\.\.64 \(the model's max_seq_len\), got 65"),
        ({"seq_len": 0}, "got 0"),
        ({"max_windows": -3}, "max_windows must be at least 1, got -3"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        evaluate(tiny(), DATA, **wrong)


def test_a_model_that_gives_no_numbers_has_no_score():
    model = tiny(tie_embeddings=False, vocab_size=37)
    with torch.no_grad():
        model.embedding.weight[int(TOKENS[60]), 0] = math.nan
    first = TOKENS.tolist().index(int(TOKENS[60])) // WINDOW + 1
    words = rf"not finite \(in window {first}\): its weight embedding.weight"
    with pytest.raises(ValueError, match=words):
        evaluate(model, DATA, seq_len=WINDOW, batch_size=1)
    broken = tiny(vocab_size=15)
    with torch.no_grad():
        next(broken.recursions.router.parameters()).fill_(math.nan)
    data = TaskData(parse_task("task:state-tracking?hops=3"), 0, 8)
    for measure in (
        lambda: evaluate(broken, data, seq_len=16),
        lambda: by_hops(broken, data, 16, 4),
    ):
        with pytest.raises(ValueError, match=r"not finite .*router"):
            measure()


@pytest.mark.gpu
def test_cuda_gives_the_figures_of_the_cpu():
    model = tiny()
    expected = evaluate(model, DATA, seq_len=9)
    found = evaluate(model.cuda(), DATA, seq_len=9, precision="float32")
    assert found.nll == pytest.approx(expected.nll, abs=1e-4)
    assert evaluate(model, DATA, seq_len=9).nll == pytest.approx(expected.nll, rel=0.03)


def test_forwards_are_made_in_bfloat16_where_that_is_the_devices_way(monkeypatch):
    """As on CUDA; the loss is float32 all the same, and the CPU stays as exact as it was."""
    model, task = tiny(), TaskData(parse_task("task:state-tracking?hops=3"), 0, 8)
    exact, hops = evaluate(model, DATA, seq_len=9), by_hops(tiny(vocab_size=15), task, 16, 4)
    assert evaluate(model, DATA, seq_len=9, precision="float32") == exact
    seen = []
    monkeypatch.setattr(Transformer, "forward", watched(Transformer.forward, seen), raising=True)
    monkeypatch.setattr(device, "is_low", lambda *_: True)
    low = evaluate(model, DATA, seq_len=9)
    assert seen and all(seen)
    assert low.nll != exact.nll and low.nll == pytest.approx(exact.nll, rel=0.02)
    seen.clear()
    low_hops = by_hops(tiny(vocab_size=15), task, 16, 4)
    for found, known in zip(
        low_hops["mean_depth_by_hops"], hops["mean_depth_by_hops"], strict=True
    ):
        assert found == (known if known is None else pytest.approx(known, rel=0.1))
    assert seen and all(seen)


def watched(forward, seen):
    """Notes whether products are made in bfloat16, and that losses are not."""

    def inner(self, *arguments, **settings):
        output = forward(self, *arguments, **settings)
        low = torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
        seen.append(low and (output.nll is None or output.nll.dtype == torch.float32))
        return output

    return inner


def test_evaluation_is_causal_unless_asked_and_says_so(squares, tmp_path):
    result = train(settings(squares, tmp_path / "run", steps=20), console=quiet())
    model, validation = result.state.model, result.corpus.validation
    causal = evaluate(model, validation, seq_len=32)
    leaking = evaluate(model, validation, seq_len=32, selection="topk")
    assert causal.causal and not leaking.causal and causal.nll != leaking.nll
    one_by_one = evaluate(model, validation, seq_len=32, batch_size=1)
    assert one_by_one.nll == pytest.approx(causal.nll, rel=1e-5)
    assert evaluate(model, validation, seq_len=32, max_depth=1).mean_depth == 1
