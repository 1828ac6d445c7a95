"""Single tokens as text and bytes."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from mor.data.tokenizer import Tokenizer, train_bpe
from mor.server.token_texts import Offsets, TokenTexts


def test_bytes_of_all_tokens_in_a_row_are_the_text():
    tokenizer = train_bpe(["der Größe nach, 日本 🙂 naïve " * 3], 300)
    texts, text = TokenTexts(tokenizer), "die Größe 日🙂 ïx"
    ids = tokenizer.encode(text)
    assert b"".join(map(texts.bytes_of, ids)) == text.encode()
    assert texts.text_of(tokenizer.end_of_text_id) == "<|endoftext|>"
    assert texts.bytes_of(10**6) == b""
    parts = [texts.text_of(i) for i in tokenizer.encode("本")]
    assert "".join(parts) == "本" or all(part.startswith("bytes:\\x") for part in parts)


def test_tokens_of_sentencepiece_keep_their_space_and_bytes():
    vocab = {"<|endoftext|>": 0, "▁a": 1, "b": 2, "<0xE2>": 3, "a": 4, "<unk>": 5}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<|endoftext|>"])
    texts = TokenTexts(Tokenizer(backend))
    assert [texts.text_of(i) for i in (1, 2, 3)] == [" a", "b", "bytes:\\xe2"]


def test_offsets_count_characters_that_are_complete():
    tokenizer = train_bpe(["ab"], 257)
    texts, ids = TokenTexts(tokenizer), tokenizer.encode("a日b")
    offsets = Offsets(texts)
    assert offsets.of(ids[:2]) + offsets.of(ids[2:]) == [0, 1, 1, 1, 2]
