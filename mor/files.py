"""Files and folders that appear whole or not at all, errors that name the file, locks, the cache
folder, optional packages."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"
CHECKSUMS = "checksums.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A free name beside ``path`` to write a file or folder under. When the block ends it becomes
    ``path``, in place of what was there; if the block fails, ``path`` stays as it was.

    The content is on the disk before the name changes, so a crash leaves the old or the new one,
    and at most hidden leftovers that :func:`tidy` removes.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _delete(unfinished)  # of an earlier process with the same number
    try:
        yield unfinished
        for file in (*unfinished.rglob("*"), unfinished):
            _flush(file)
        if path.is_dir():  # a folder cannot be renamed over one that holds something
            aside = path.rename(path.with_name(f".{path.name}.replaced.old"))
            unfinished.rename(path)
            shutil.rmtree(aside)
        else:
            unfinished.replace(path)
        _flush(path.parent)
    finally:
        _delete(unfinished)


def remove_folder(path: Path) -> None:
    """Delete a folder. It disappears from view first, so an interruption leaves no half of it."""
    doomed = path.rename(path.with_name(f".{path.name}.removed.old"))
    shutil.rmtree(doomed)


def tidy(folder: Path) -> None:
    """Clean up what a killed process left in a folder: half-written files, old ones set aside."""
    for unfinished in folder.glob(".*.tmp"):
        _delete(unfinished)
    for aside in folder.glob(".*.old"):
        name = aside.name.removeprefix(".").rsplit(".", 2)[0]
        if (folder / name).exists() or aside.name.endswith(".removed.old"):
            _delete(aside)
        else:  # killed between the two renames of a replacement
            aside.rename(folder / name)


def link(path: Path, target: Path) -> None:
    """Make ``path`` a link to ``target``, in one step and in place of what was there. target: an
    absolute path, or one relative to the folder of ``path``, which survives that folder's moves.

    Raises OSError on filesystems without links.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _delete(unfinished)
    unfinished.symlink_to(target)
    if path.is_dir() and not path.is_symlink():  # a copy that followed the link
        remove_folder(path)
    unfinished.replace(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file, only when the new one is complete."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=2))


def read_json(path: Path) -> dict[str, Any]:
    """The table that a JSON file holds. Raises ValueError if the file is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it or restore a copy") from None
    return parse_json(text, path)


def parse_json(text: str, place: object) -> dict[str, Any]:
    """The table that a text holds; place: the file, for the message. Raises ValueError as above."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is damaged: {error}; delete it or restore a copy") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place} is damaged: it holds no table; delete it or restore a copy")
    return values


def write_checksums(folder: Path) -> None:
    """Write the checksum of every file in a folder, for :func:`verify`."""
    sums = {str(f.relative_to(folder)): _checksum(f) for f in folder.rglob("*") if f.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2))


def renew_checksum(folder: Path, name: str) -> None:
    """Write the checksum of one file that was changed on purpose; the others stay as they are. The
    list of checksums becomes a new file, in case the old one has other names."""
    sums = read_json(folder / CHECKSUMS) | {name: _checksum(folder / name)}
    write_json(folder / CHECKSUMS, sums)


def verify(folder: Path, read: Sequence[str]) -> None:
    """Raise ValueError naming the first file that is missing, has changed since its checksum was
    written, or has none. read: patterns of the files that somebody is about to read, by their paths
    in the folder; what else others put there does not matter."""
    if not (folder / CHECKSUMS).is_file():
        raise ValueError(f"{folder} has no {CHECKSUMS}: mor did not write it, or did not finish it")
    sums = read_json(folder / CHECKSUMS)
    there = {
        str(file.relative_to(folder))
        for pattern in read
        for file in folder.glob(pattern)
        if file.is_file() and file.name != CHECKSUMS
    }
    listed = {name for name in sums if any(fnmatch(name, pattern) for pattern in read)}
    for name in sorted(there | listed):
        if name not in there:
            raise ValueError(f"{folder / name} is missing")
        if name not in listed:
            raise ValueError(
                f"{folder / name} has no checksum in {CHECKSUMS}: one of the two is damaged or new"
            )
        if _checksum(folder / name) != sums[name]:
            raise ValueError(f"{folder / name} is damaged: its checksum has changed")


def check_links(folder: Path) -> None:
    """Raise ValueError for a link that leads nowhere: a reader would take the file for one that was
    never there."""
    for path in sorted(folder.glob("[!.]*")):
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, which is not there; restore the file "
                "or delete the link"
            )


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def alone_in(folder: Path, *, doing: str) -> Iterator[None]:
    """Make a folder and hold it for this process alone. doing: for the message, "training in".

    The lock goes with the process however that ends; its holder may take it again. A folder that
    is left empty is removed. Raises ValueError if another process holds the lock.
    """
    lock = FileLock(folder / LOCK, blocking=False, is_singleton=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is {doing} {folder}; wait until it ends, or choose another --out"
        ) from None
    try:
        yield
    finally:
        outermost = lock.lock_counter == 1
        if outermost and [file.name for file in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder)  # before the lock is free, while nobody else can have begun here
        lock.release()


def cache_folder() -> Path:
    """An existing folder for files that can be recreated: ``$XDG_CACHE_HOME/mor``, or
    ``~/.cache/mor`` where that variable is unset or empty.

    Nobody else may write there, because the cache holds compiled code. Where that is not so, a
    private folder that goes with this process, and a warning that names what is wrong.
    """
    return _private_folder(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


@functools.cache
def _private_folder(place: str) -> Path:
    folder = Path(place) / "mor"
    problem = _problem_of_cache(folder)
    if problem is None:
        return folder
    folder = Path(tempfile.mkdtemp(prefix="mor-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"{problem}, so cached files are made again in every process; set XDG_CACHE_HOME to a "
        "folder of your own",
        stacklevel=3,
    )
    return folder


def _problem_of_cache(folder: Path) -> str | None:
    if not folder.is_absolute():
        return f"XDG_CACHE_HOME={folder.parent} is not an absolute path"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"the cache {folder} cannot be written ({error.strerror})"
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to the cache {folder} (chmod 700 mends that if it is yours)"
    return None


@contextmanager
def extra(name: str, *, needed_for: str) -> Iterator[None]:
    """Around imports of optional packages: says how to install them if one is missing.

    name: the extra in pyproject.toml that brings them. Raises ImportError.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{needed_for} needs more packages ({error}); install them with: "
            f'pip install "mixture-of-recursions[{name}]"'
        ) from error


def read_toml(path: Path) -> dict[str, Any]:
    """The table that a file holds. Raises ValueError with the place of a mistake."""
    with naming(path):
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Put the name of a file, or of what it holds, before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
