"""manifest.json: whatever is wrong in it is an error that names it."""

import json

import pytest

from mor.data.manifest import is_prepared, read_manifest
from mor.data.shards import PrepareConfig, prepare
from tests.data.documents import write_jsonl

SPLIT = ("splits", "train")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    config = PrepareConfig(tokenizer="bytes", workers=1)
    prepare([write_jsonl(folder / "a.jsonl", ["x", "y"])], folder / "out", config)
    return (folder / "out" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("format",), None, "is damaged.* format"),
        (("format",), 7, "has format 7; this version reads 1"),
        (("settings",), None, "settings"),
        (("settings", "dtype"), "int8", "settings.dtype"),
        (("settings", "tokenizer", "fingerprint"), None, "settings.tokenizer.fingerprint"),
        (("splits",), [], "splits"),
        ((*SPLIT, "tokens"), "many", "splits.train.tokens"),
        ((*SPLIT, "tokens"), 3, "tokens of the shards do not add up to 3"),
        ((*SPLIT, "shards"), None, "splits.train.shards"),
        ((*SPLIT, "shards"), [{"name": "../../etc/x"}], "shards"),
    ],
)
def test_what_is_missing_or_wrong_is_named(place, value, named, manifest, tmp_path):
    values = json.loads(manifest)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=named):
        read_manifest(tmp_path)


def test_unfinished_data_is_no_text_and_text_may_have_its_own_manifest(manifest, tmp_path):
    assert not is_prepared(tmp_path)
    (tmp_path / "manifest.json").write_text("of somebody else")
    assert not is_prepared(tmp_path)
    (tmp_path / "manifest.json").rename(tmp_path / "progress.jsonl")
    (tmp_path / "tokenizer.json").touch()
    assert is_prepared(tmp_path)
    with pytest.raises(ValueError, match="unfinished: run the same `mor data prepare` again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        read_manifest(tmp_path)
