"""Text of tokens that come one by one: the whole text, cut at the first stop string, never less
than complete characters."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models

from mor.data.text_stream import TextStream
from mor.data.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe


def _byte_fallback():
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    names += ["▁", "a", "b", "▁a", "ab", "日", ".", "▁."]
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", *names])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", END_OF_TEXT])
    return Tokenizer(backend)


def _words(decoder):
    vocab = {"a": 0, "##b": 1, "▁c": 2, ".": 3, "n't": 4, "日": 5, "▁": 6}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def _with_added_tokens():
    made = byte_tokenizer().backend
    made.add_tokens(["日本", "two words", "ÿ"])
    return Tokenizer(made)


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bpe": train_bpe(["naïve 日本語 text, text and 🙂 text " * 3], 290),
    "added": _with_added_tokens(),
    "byte-fallback": _byte_fallback(),
    "wordpiece": _words(decoders.WordPiece()),
    "metaspace": _words(decoders.Metaspace()),
    "suffix": _words(decoders.BPEDecoder("日")),
    "no-decoder": _words(None),
}
BYTES = ["a", "b", " ", "\n", "日", "🙂", "é"]


def _first_stop(text, stop):
    """Character by character: where the text ends, and why."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if s and text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def _ids(tokenizer, draw, name):
    """Random tokens, and some that make text: only bytes that fit each other make a character."""
    ids = []
    while len(ids) < 30:
        if name in ("bytes", "bpe", "added") and draw.random() < 0.6:
            ids += tokenizer.encode(draw.choice(BYTES))
        elif name == "byte-fallback" and draw.random() < 0.6:
            ids += [2 + byte for byte in draw.choice(BYTES).encode()]
        else:
            ids.append(draw.randrange(tokenizer.vocab_size + 2))
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_split_gives_the_text_of_all_tokens_up_to_the_first_stop_string(name):
    for seed in range(60):
        _check_a_split(TOKENIZERS[name], name, random.Random(seed))


def _check_a_split(tokenizer, name, draw):
    ids = _ids(tokenizer, draw, name)
    text = tokenizer.decode(ids)
    start = draw.randrange(len(text) + 1)
    stop = [text[start : start + draw.randint(1, 4)]]
    stop += [draw.choice(["ab", "aab", "b\n", "日", "\ufffd\ufffd", ". "])]
    for wanted in ((), tuple(filter(None, stop))):
        stream, shown, place = TextStream(tokenizer, wanted), "", 0
        while place < len(ids) and stream.stopped is None:
            # With tokens of single bytes, the tokens so far count as all there are.
            step = 1 if name == "byte-fallback" else draw.randint(1, 3)
            shown += stream.feed(ids[place : place + step])
            place += step
        if stream.stopped is None:
            shown += stream.end()
        assert shown == text or stream.stopped is not None
        assert (shown, stream.stopped) == _first_stop(tokenizer.decode(ids[:place]), wanted)
        assert stream.end() == "" and (stream.stopped is None or stream.feed(ids) == "")


def test_what_may_become_something_else_is_held_back():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["</s>", "<s>"])
    pieces = [stream.feed([i]) for i in tokenizer.encode("日a</b><")]
    assert pieces == ["", "", "日", "a", "", "", "</b", ">", ""] and stream.end() == "<"
    cut = TextStream(tokenizer, ["</s>", "<s>"])
    assert cut.feed(tokenizer.encode("a</s>b")) == "a" and cut.stopped == "</s>"
    assert cut.feed(tokenizer.encode("c")) == "" and cut.end() == ""
    broken = TextStream(tokenizer)
    assert broken.feed(tokenizer.encode("日")[:2]) == "" and broken.end() == "\ufffd"


def test_of_several_stop_strings_the_one_that_is_complete_first_ends_the_text():
    tokenizer = byte_tokenizer()
    for text, stop, shown, stopped in (
        ("xabcd", ("abcd", "bc"), "xa", "bc"),
        ("xabc", ("bc", "abc", "c"), "x", "abc"),
        ("aab", ("ab",), "a", "ab"),
    ):
        for size in (1, 2, 9):
            stream, ids = TextStream(tokenizer, stop), tokenizer.encode(text)
            got = "".join(stream.feed(ids[i : i + size]) for i in range(0, len(ids), size))
            assert (got, stream.stopped) == (shown, stopped)


def test_a_stop_string_that_is_complete_too_early_stops_nothing_later_either():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["b", "abc"])
    assert stream.feed(tokenizer.encode("ab"), may_stop=False) == ""
    assert stream.feed(tokenizer.encode("x")) == "abx" and stream.stopped is None
    assert stream.feed(tokenizer.encode("ab")) == "a" and stream.stopped == "b"


def test_a_character_of_byte_tokens_stops_when_it_is_there():
    tokenizer = TOKENIZERS["byte-fallback"]
    stream = TextStream(tokenizer, ["🙂"])
    shown = [stream.feed([2 + byte]) for byte in "a🙂".encode()]
    assert "".join(shown) == "a" and stream.stopped == "🙂"


def test_a_token_costs_the_same_at_the_end_of_a_long_text():
    """Never more than a few tokens are decoded at a time."""
    for name in ("byte-fallback", "wordpiece"):
        tokenizer, sizes = TOKENIZERS[name], []
        stream, decode = TextStream(tokenizer, ["never"]), tokenizer.decode
        tokenizer.decode = lambda ids, d=decode, s=sizes: (s.append(len(ids)), d(ids))[1]
        try:
            ids = random.Random(0).choices(range(tokenizer.vocab_size), k=400)
            stream.feed([i for i in ids if name != "byte-fallback" or i > 257 or i % 9])
        finally:
            del tokenizer.decode
        assert sizes and max(sizes) < 400 and sum(sizes) < 3000


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        TextStream(byte_tokenizer(), ["a", ""])
