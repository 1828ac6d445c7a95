"""Files and folders appear whole or not at all, locks, the cache folder, hints at extras."""

import os
import re
import stat
from pathlib import Path

import pytest
from filelock import FileLock

from mor.files import (
    LOCK,
    alone_in,
    cache_folder,
    check_links,
    extra,
    read_json,
    replacing,
    tidy,
    verify,
    write_checksums,
    write_json,
)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})

    def half(path, text):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="no space"):
            write_json(tmp_path / "a.json", {"a": 2})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"], "no half is left"


def test_a_folder_takes_the_place_of_another_only_when_it_is_complete(tmp_path):
    place = tmp_path / "folder"

    def fill(*names, fail=False):
        with replacing(place) as unfinished:
            unfinished.mkdir()
            for name in names:
                (unfinished / name).write_text(name)
            if fail:
                raise OSError("no space left")

    fill("a", "b")
    with pytest.raises(OSError, match="no space"):
        fill("c", fail=True)
    assert sorted(path.name for path in place.iterdir()) == ["a", "b"]
    fill("c")
    assert [path.name for path in place.iterdir()] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_is_undone(tmp_path):
    for name in (".half.12.tmp", ".gone.removed.old", ".set-aside.replaced.old", ".new.9.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "new").mkdir()
    (tmp_path / ".file.12.tmp").touch()
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "set-aside"]
    tidy(tmp_path / "nowhere")


READ = ("a", "inner/*")


def test_a_changed_or_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no checksums"):
        verify(tmp_path, READ)
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    verify(tmp_path, READ)
    (tmp_path / "inner/b").write_text("c")
    with pytest.raises(ValueError, match="inner/b is damaged"):
        verify(tmp_path, READ)
    verify(tmp_path, ["a"])
    (tmp_path / "a").unlink()
    with pytest.raises(ValueError, match="a is missing"):
        verify(tmp_path, READ)


@pytest.mark.parametrize("sums", ["{}", '{"files": {}}', '{"inner/b": ""}'])
def test_what_is_read_has_a_checksum_and_what_others_put_there_needs_none(sums, tmp_path):
    (tmp_path / "a").write_text("a")
    write_checksums(tmp_path)
    (tmp_path / "README.md").touch()
    verify(tmp_path, READ)
    (tmp_path / "checksums.json").write_text(sums)
    with pytest.raises(ValueError, match=r"/a has no checksum in checksums\.json"):
        verify(tmp_path, ["a"])


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("there")
    check_links(tmp_path)
    (tmp_path / "there").unlink()
    with pytest.raises(ValueError, match="link is a link to there, which is not there"):
        check_links(tmp_path)


def test_a_lock_is_for_one_process_and_leaves_no_empty_folder(tmp_path):
    place = tmp_path / "a" / "b"
    with alone_in(place, doing="working in"), alone_in(place, doing="working in"):
        assert place.is_dir()
    assert not place.exists(), "nothing was begun"
    with alone_in(place, doing="working in"):
        (place / "file").touch()
    with FileLock(place / LOCK), pytest.raises(ValueError, match=r"another process is working in"):
        alone_in(place, doing="working in").__enter__()
    with alone_in(place, doing="working in"):
        pass
    assert (place / "file").exists()


def test_the_cache_folder_is_that_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "mor" and cache_folder().is_dir()
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "mor"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "mor"


def test_a_cache_that_cannot_be_used_is_named_and_replaced_by_a_private_one(tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # no folder can be made in it, whoever asks
    (tmp_path / "open" / "mor").mkdir(parents=True)
    (tmp_path / "open" / "mor" / "planted").touch()
    (tmp_path / "open" / "mor").chmod(0o777)
    for place, words in (
        ("relative", "XDG_CACHE_HOME=relative is not an absolute path"),
        (str(tmp_path / "file"), f"the cache {tmp_path / 'file' / 'mor'} cannot be written"),
        (str(tmp_path / "open"), f"others can write to the cache {tmp_path / 'open' / 'mor'}"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        with pytest.warns(UserWarning, match=re.escape(words)):
            private = cache_folder()
        (private / "library").write_text("can be written")
        assert private == cache_folder() and not private.is_relative_to(tmp_path)
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert private.stat().st_uid == os.getuid() and not (private / "planted").exists()
    assert not (Path.cwd() / "relative").exists()


def test_a_missing_package_names_its_extra():
    with (
        pytest.raises(
            ImportError,
            match=r"charts needs more packages \(No module named 'nowhere'\).*recursions\[hf\]",
        ),
        extra("hf", needed_for="charts"),
    ):
        import nowhere  # noqa: F401
