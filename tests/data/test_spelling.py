"""What tokenizers lose of a text, to the byte, and that it is said."""

import json
import warnings

import pytest
import tokenizers
from rich.console import Console
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mor.data.config import DataConfig
from mor.data.corpus import load_corpus, load_tokens, tokenize
from mor.data.shards import PrepareConfig, prepare
from mor.data.sources import Document
from mor.data.spelling import Spelling, spelling
from mor.data.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe


def finished(model, pre_tokenizer=None, decoder=None, normalizer=None):
    backend = tokenizers.Tokenizer(model)
    for name, part in (
        ("pre_tokenizer", pre_tokenizer),
        ("decoder", decoder),
        ("normalizer", normalizer),
    ):
        if part is not None:
            setattr(backend, name, part)
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def words(*known, **parts):
    vocab = {word: i for i, word in enumerate(["<unk>", *known])}
    model = models.WordLevel(vocab, unk_token="<unk>")
    return finished(model, pre_tokenizers.WhitespaceSplit(), **parts)


def characters(known, decoder=None):
    return finished(models.BPE({c: i for i, c in enumerate(known)}, []), decoder=decoder)


def unigram(known):
    pieces = [("<unk>", 0.0), *((c, -1.0) for c in known)]
    model = models.Unigram(pieces, unk_id=0)
    return finished(model, pre_tokenizers.Metaspace(), decoders.Metaspace())


def lower_case():
    return words("the", "cat", normalizer=normalizers.Lowercase())


TEXT = "the cat, the 日"
CASES = {
    "bytes": (byte_tokenizer, TEXT, Spelling(text=13)),
    "BPE": (lambda: train_bpe([TEXT] * 3, 260), TEXT, Spelling(text=13)),
    "words": (
        lambda: words("the"),
        TEXT,
        Spelling(text=13, lost=7, changed=2, examples=("cat,", "日")),
    ),
    "all words": (lambda: words("the", "cat,", "日"), TEXT, Spelling(text=13)),
    "words, lower case": (lower_case, "The CAT", Spelling(text=6)),
    "white space": (lambda: words("the", "cat"), "the \n cat\n", Spelling(text=6, changed=3)),
    "dropped characters": (
        lambda: characters("the ", decoders.Fuse()),
        TEXT,
        Spelling(text=13, lost=6, examples=("c", "a", ",")),
    ),
    "no decoder": (lambda: characters("the "), "the he", Spelling(text=5, changed=5)),
    "Unigram": (lambda: unigram("▁thecat,日"), TEXT, Spelling(text=13)),
    "Unigram without 日": (
        lambda: unigram("▁thecat,"),
        TEXT,
        Spelling(text=13, lost=3, examples=("日",)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_lost_is_known_to_the_byte(name):
    make, text, expected = CASES[name]
    tokenizer = make()
    assert spelling(tokenizer, [text], tokenizer.encode_documents([text])) == expected
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = tokenize([Document("a", text)], tokenizer, "a.txt")
    is_exact = expected.lost == expected.changed == 0
    assert (len(said) == 0) == data.is_spelt == is_exact
    (scored,) = data.scored(100)
    first = int(tokenizer.text_bytes.first[tokenizer.encode_documents([text])[0][0]])
    bytes_scored = len(text.encode()) - first  # nothing predicts the first token
    assert data.text_bytes(scored.batch) == (bytes_scored if is_exact else 0)
    if expected.lost:
        (message,) = (str(each.message) for each in said)
        assert f"no tokens for {100 * expected.lost / 13:.2g}% of a.txt" in message
        assert repr(expected.examples[0]) in message and "no bits per byte" in message


def test_a_single_lost_character_is_named_and_leaves_the_bits_per_byte():
    tokenizer = unigram("▁thecat,")
    text = "the cat, " * 500 + "日"
    with pytest.warns(UserWarning, match=r"no tokens for 0.086% of the text .*: the loss is that"):
        assert tokenize([Document("a", text)], tokenizer).is_spelt


def test_text_of_another_kind_is_refused():
    text = Document("a", "to be or not to be " * 9 + "the")
    with pytest.raises(ValueError, match=r"cannot read a.txt: .* 97.5% of it, such as 'to', 'be'"):
        tokenize([text], words("the"), "a.txt")
    task = load_corpus(DataConfig(path="task:pointer-chasing")).tokenizer
    with pytest.raises(ValueError, match="this tokenizer cannot read the text"):
        tokenize([Document("a", "the cat sat")], task)
    assert tokenize([Document("a", "a>b +2 a")], task).is_spelt


def test_coverage_is_that_of_the_text_and_not_of_its_white_space():
    some, none = unigram("▁日ж🛑"), unigram("▁日")
    assert some.has_tokens_for_all and not some.remarks()
    assert "such as ж, 🛑;" in none.remarks()[0] and not none.has_tokens_for_all


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lossy")
    words("the", "cat").save(folder)
    rows = [{"text": "the cat " * 5}, {"text": "the dog"}, {"text": "cat"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(record=True, width=500)
    config = PrepareConfig(tokenizer=str(folder), workers=1)
    manifest = prepare([str(folder / "a.jsonl")], folder / "out", config, console=console)
    return folder / "out", manifest, console.export_text()


def test_prepared_data_keep_what_was_lost(prepared):
    out, manifest, said = prepared
    expected = Spelling(text=39, lost=3, changed=2, examples=("dog",)).plain()
    assert manifest["splits"]["train"]["spelling"] == expected
    assert "no tokens for 7.7% of the train split (in bytes), such as 'dog'" in said
    with pytest.warns(UserWarning, match="7.7% of the train split of .*no bits per byte"):
        assert not load_tokens(out, Tokenizer.load(out)).is_spelt


def test_text_of_another_kind_is_not_prepared(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be")
    config = PrepareConfig(tokenizer=str(prepared[0]), workers=1)
    with pytest.raises(ValueError, match=r"cannot read the text of the train split: .* 100.0% of"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", config, console=Console(quiet=True))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_of_data_that_mor_0_1_0_prepared_it_is_not_known(prepared):
    out, manifest, _ = prepared
    old = json.loads(json.dumps(manifest))
    for entry in (old["splits"]["train"], *old["splits"]["train"]["shards"]):
        del entry["spelling"]
    (out / "manifest.json").write_text(json.dumps(old))
    with pytest.warns(UserWarning, match="mor 0.1.0, which did not count"):
        assert not load_tokens(out, Tokenizer.load(out)).is_spelt
    (out / "manifest.json").write_text(json.dumps(manifest))
