"""Nothing that a user may download runs: a hostile file in each place that mor reads.

The optimizers' state is in tests/training/test_sharded_state.py, the cache in tests/test_files.py.
"""

import ast
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import mor
from mor import checkpoint
from mor.chat import Chat
from mor.data.corpus import load_tokens
from mor.data.shards import PrepareConfig, prepare
from mor.data.tokenizer import Tokenizer, byte_tokenizer
from tests.conftest import tiny

READS = {"load", "loads", "Unpickler", "load_state_dict_from_url", "read_pickle"}


def test_no_module_unpickles_or_runs_what_it_reads():
    """The unpickler of sharded_state.py takes nothing but a list of records."""
    found = []
    for path in Path(mor.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            named = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
            function = ast.unparse(call.func)
            module, _, name = function.rpartition(".")
            bad = (
                function in ("eval", "exec", "compile", "__import__")
                or (name in READS and module in ("pickle", "dill", "joblib", "yaml", "marshal"))
                or (function == "torch.load" and named.get("weights_only") is not True)
                or (name == "load" and module in ("np", "numpy") and named.get("allow_pickle"))
                or named.get("trust_remote_code")
                or (
                    name == "from_pretrained"
                    and "trust_remote_code" not in named
                    and not any(word.arg is None for word in call.keywords)
                )
            )
            found += [f"{path.name}: {ast.unparse(call)}"] if bad else []
    assert found == []


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """What hostile files make; it must never be there."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists(), "code of a file ran"


def test_weights_are_safetensors_and_no_pickle_beside_or_instead_of_them(tmp_path, mark):
    checkpoint.save(tmp_path / "model", tiny(vocab_size=257), byte_tokenizer())
    for name in ("pytorch_model.bin", "model.pt", "training_state.pt"):
        (tmp_path / "model" / name).write_bytes(pickle.dumps(Hostile(mark)))
    try:
        assert checkpoint.load(tmp_path / "model").config.vocab_size == 257
    except ValueError as refused:  # files that no checksum covers
        assert "pytorch_model.bin" in str(refused)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError)):
        checkpoint.load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(ValueError):
        checkpoint.load(tmp_path / "model")


def test_shards_hold_numbers_only(tmp_path, mark):
    (tmp_path / "a.txt").write_text("One line.\n" * 40)
    settings = PrepareConfig(tokenizer="bytes", workers=1)
    prepare([str(tmp_path / "a.txt")], tmp_path / "data", settings)
    (ends,) = (tmp_path / "data").rglob("*.ends.npy")
    np.save(ends, np.array([Hostile(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        load_tokens(tmp_path / "data", byte_tokenizer()).batch([0], 8)


def tokenizer_folder(folder, **config):
    folder.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.save(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(saved | config))
    return folder


def test_a_tokenizer_brings_no_code(tmp_path, mark, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    auto = {"AutoTokenizer": [None, "hostile.Hostile"]}
    folder = tokenizer_folder(tmp_path / "t", auto_map=auto, tokenizer_class="Hostile")
    (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("ab") == byte_tokenizer().encode("ab")
    with pytest.raises(ValueError, match="trust_remote_code"):
        tokenizer.to_transformers()


@pytest.mark.parametrize(
    "attack",
    [
        "cycler.__init__.__globals__.os.mkdir(MARK)",
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.append(1)",
    ],
)
def test_a_chat_template_is_rendered_in_a_sandbox(tmp_path, mark, attack):
    pytest.importorskip("transformers")
    template = "{{ " + attack.replace("MARK", repr(str(mark))) + " }}"
    folder = tokenizer_folder(tmp_path / "t", chat_template=template)
    with pytest.raises(Exception, match=r"unsafe|not safely callable|access to attribute"):
        Chat(Tokenizer.load(folder)).prompt([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("kind", ["llama", "hostile"])
def test_a_pretrained_model_brings_no_code(tmp_path, mark, monkeypatch, kind):
    pytest.importorskip("transformers")
    from mor.conversion.llama import read_llama
    from tests.small_llama import save_llama

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    folder = Path(save_llama(tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    config |= {"auto_map": code, "model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    if kind == "hostile":
        with pytest.raises(ValueError):
            read_llama(str(folder))
        return
    read_llama(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        read_llama(str(folder))
