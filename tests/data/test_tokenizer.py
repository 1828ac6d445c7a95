"""Tokenizers: any text comes back."""

import json
import threading

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from mor.data.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe

TEXT = "Recursion, n.: see recursion. Größe ☃ 日本語\n\n\tdef f(x): return x\n"


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe([TEXT] * 5, 300)])
def test_tokenizers_round_trip_any_text_and_load_in_transformers(make, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.vocab_size and tokenizer.end_of_text_id < tokenizer.vocab_size
    same_ids, pieces_of_text = tokenizer.encode_with_pieces(TEXT)
    assert same_ids == ids and tokenizer.encode_with_pieces("") == ([], [])
    for pieces in (pieces_of_text, tokenizer.pieces(ids)):
        assert "".join(pieces) == TEXT and len(pieces) == len(ids)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(TEXT) == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == ids and theirs.eos_token_id == tokenizer.end_of_text_id


def test_bytes_cost_one_token_each_and_bpe_fewer():
    assert len(byte_tokenizer().encode(TEXT)) == len(TEXT.encode())
    assert len(train_bpe([TEXT] * 5, 300).encode(TEXT)) < len(TEXT.encode())
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe([TEXT], 200)


# Settings of batches and of training


def tampered(tmp_path, change):
    """A BPE whose tokenizer.json was changed by hand."""
    train_bpe([TEXT] * 5, 300).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    return Tokenizer.load(tmp_path)


BATCH_SETTINGS = {
    "truncation": {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    },
    "padding": {
        "strategy": {"Fixed": 512},
        "direction": "Left",
        "pad_to_multiple_of": 64,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
    },
}


@pytest.mark.parametrize("name", [*BATCH_SETTINGS, "dropout"])
def test_settings_of_batches_and_training_do_not_act_on_documents(name, tmp_path):
    plain = train_bpe([TEXT] * 5, 300)
    texts = [TEXT, "short", "", TEXT * 20]
    expected = plain.encode_documents(texts)

    def change(values):
        if name == "dropout":
            values["model"]["dropout"] = 0.9
        else:
            values[name] = BATCH_SETTINGS[name]

    tokenizer = tampered(tmp_path, change)
    for again in (tokenizer, Tokenizer.from_transformers(tokenizer.to_transformers())):
        assert again.encode_documents(texts) == expected
        assert [again.encode(text) for text in texts] == expected
        assert again.fingerprint == plain.fingerprint
    beginning = [0] if name == "post_processor" else []
    assert tokenizer.encode_prompt(TEXT) == beginning + expected[0], "a prompt has no end"


def test_sampling_of_a_unigram_does_not_act_on_documents():
    pieces = [("<unk>", 0.0), ("a", -1.0), ("aa", -1.0), ("aaa", -1.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens([END_OF_TEXT])
    expected = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str())).encode("a" * 50)
    backend.model.alpha, backend.model.nbest_size = 0.1, 8
    assert Tokenizer(backend).encode("a" * 50) == expected


def test_nothing_in_a_document_is_a_special_token():
    tokenizer = train_bpe([TEXT] * 5, 300)
    text = f"before{END_OF_TEXT}after"
    (ids,) = tokenizer.encode_documents([text])
    assert tokenizer.end_of_text_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [
        *tokenizer.encode("before"),
        tokenizer.end_of_text_id,
        *tokenizer.encode("after"),
    ]


def test_a_normalizer_belongs_to_the_tokenizer_and_acts_on_every_document():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, END_OF_TEXT: 1}, unk_token="a"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 1)]
    )
    assert Tokenizer(backend).encode_documents(["A a"]) == [[0, 0]]


# Ids


def test_the_size_is_the_largest_id_and_one(tmp_path):
    def change(values):
        values["model"]["vocab"][END_OF_TEXT] = 70_000
        values["added_tokens"][0]["id"] = 70_000

    tokenizer = tampered(tmp_path, change)
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (70_001, 70_000)
    assert "300 tokens with ids up to 70,000" in tokenizer.remarks()[0]
    assert not byte_tokenizer().remarks()
    tokenizer.check_fits(70_001)
    with pytest.raises(ValueError, match=r"ids up to 70000, the model embeddings for 0..69999"):
        tokenizer.check_fits(70_000)


def test_a_tokenizer_that_cannot_write_every_text_says_so():
    for unknown in ("<unk>", None):
        vocab = {"日": 0, "<unk>": 1, END_OF_TEXT: 2}
        tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE(vocab, [], unk_token=unknown)))
        assert "no tokens for some text, such as ж, 🛑;" in tokenizer.remarks()[0]
    strict = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, END_OF_TEXT: 1}, "none")))
    assert "such as 日, ж, 🛑;" in strict.remarks()[0]
    with pytest.raises(ValueError, match=r"cannot encode this text: .*\[UNK\]"):
        strict.encode_documents(["b"])


# Damaged and missing files


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is damaged: Model missing"),
        ("tokenizer.json", "", "tokenizer.json is damaged"),
        ("tokenizer.json", "[1]", "tokenizer.json is damaged"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is damaged.*holds no table"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is damaged: maximum rec"),
        ("generation_config.json", '{"pad_token_id": -3}', "pad_token_id=-3 is not a token"),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token is not text but 7"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "has no token '</s>'"),
        ("special_tokens_map.json", "x", "special_tokens_map.json is damaged"),
    ],
)
def test_a_damaged_file_is_named_with_its_folder(name, text, named, tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{named}"):
        Tokenizer.load(tmp_path)


def test_what_stands_for_a_file_and_cannot_be_read_is_named(tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is a link to nowhere, which"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: it cannot be read"):
        Tokenizer.load(tmp_path)


def test_special_ids_of_a_tokenizer_for_another_model_are_its_own_tokens(tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 257]}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=\[256, 257\] is"):
        Tokenizer.find(str(tmp_path))


def test_a_tokenizer_without_tokens_for_text_is_damaged(tmp_path):
    with pytest.raises(ValueError, match="text gives no tokens"):
        tampered(tmp_path, lambda values: values["model"].update(vocab={}, merges=[]))


def test_a_missing_file_gets_advice_that_fits(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json; copy there the one that belongs"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").touch()
    with pytest.raises(ValueError, match=r"but vocab.json; write one with transformers"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder; give 'bytes'"):
        Tokenizer.find(str(tmp_path / "missing"))


def test_a_run_means_the_tokenizer_of_its_newest_checkpoint(tmp_path):
    for step, tokenizer in ((1, byte_tokenizer()), (20, train_bpe([TEXT], 300))):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        tokenizer.save(folder)
    assert Tokenizer.find(str(tmp_path)).vocab_size == 300


def test_a_long_text_lets_other_threads_run():
    tokenizer, text, over = byte_tokenizer(), "ab cd ef " * 60_000, threading.Event()
    ticks = []

    def tick():
        while not over.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    ids = tokenizer.encode(text)
    over.set()
    thread.join()
    assert len(ids) == len(text)
    assert len(ticks) > 5, "alone it would have kept the thread waiting to its end"


def test_how_long_a_token_can_be_is_known_where_text_is_not_changed_before():
    assert byte_tokenizer().most_bytes_per_token == len(END_OF_TEXT)
    merged = train_bpe(["aaaaaaaa" * 50] * 20, 262)
    assert merged.most_bytes_per_token == max(
        len(END_OF_TEXT), *(len(merged.bytes_of(i)) for i in range(merged.vocab_size))
    )
    for change in (
        lambda backend: setattr(backend, "normalizer", tokenizers.normalizers.NFC()),
        lambda backend: backend.add_tokens([tokenizers.AddedToken("x", lstrip=True)]),
    ):
        backend = byte_tokenizer().backend
        change(backend)
        assert Tokenizer(backend).most_bytes_per_token is None
