"""Task files for lm-eval that read flat copies of the paper's benchmarks, one formatted record a
line.

    python benchmarks/flat_tasks.py FLAT OUT
    mor eval RUN --tasks piqa,arc --include-path OUT

FLAT holds some of hellaswag_val.jsonl, piqa_val.jsonl and so on (see FLAT_FILES; also .zst or .gz).
Every task includes lm-eval's own and changes only where the text stands, so it asks what lm-eval
asks of the data on the hub. Only MMLU has examples (its dev split); the others are 0-shot.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mor.data.readers import damage_errors, unpacked_lines
from mor.evaluation.harness import STOCK_TASKS

Record = dict[str, Any]


class FlatFile(NamedTuple):
    """stem: the file is STEM.jsonl. stock: the task file that lm-eval has. split: which of its
    splits this is. settings: what differs, by lm-eval's names. forms: what fields must look like
    for the task to ask what lm-eval's own asks, as regular expressions."""

    stem: str
    stock: str
    split: str
    settings: dict[str, Any]
    forms: dict[str, str]


_CHOICE = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
_QUESTION = {"query": "Question: .*\nAnswer:"}
FLAT_FILES = {
    "lambada_openai": FlatFile(
        "lambada_openai_test",
        "lambada/lambada_openai.yaml",
        "test",
        {"doc_to_text": "context", "doc_to_target": "continuation", "target_delimiter": ""},
        {"continuation": " [^ ]+"},
    ),
    "hellaswag": FlatFile(
        "hellaswag_val",
        "hellaswag/hellaswag.yaml",
        "validation",
        _CHOICE | {"process_docs": None},
        {},
    ),
    "piqa": FlatFile("piqa_val", "piqa/piqa.yaml", "validation", _CHOICE, _QUESTION),
    "winogrande": FlatFile(
        "winogrande_xl_val",
        "winogrande/default.yaml",
        "validation",
        {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"},
        {},
    ),
    "arc_easy": FlatFile("arc_easy_test", "arc/arc_easy.yaml", "test", _CHOICE, _QUESTION),
    "arc_challenge": FlatFile(
        "arc_challenge_test", "arc/arc_challenge.yaml", "test", _CHOICE, _QUESTION
    ),
}
_MMLU_FIELDS = ("subject", "question", "choices", "gold")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("flat", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    print(f"{options.out}: {', '.join(write_tasks(options.flat, options.out))}")


def write_tasks(flat: Path, out: Path) -> list[str]:
    """Write task files and their records to ``out`` for all benchmarks that ``flat`` holds; returns
    lm-eval's names of these.

    Raises ValueError for a folder without any, and for a damaged file or a wrong record in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, file in FLAT_FILES.items():
        if (path := find_file(flat, file.stem)) is not None:
            fields = [v for k, v in file.settings.items() if k.startswith("doc_to_")]
            records = read_records(path, fields, file.forms)
            splits = {f"{kind}_split": None for kind in ("training", "validation", "test")}
            splits |= {f"{file.split}_split": file.split, "fewshot_split": None}
            settings = splits | {"num_fewshot": 0} | file.settings
            write_task(out, name, file.stock, {file.split: records}, settings)
            written.append(name)
    if (path := find_file(flat, "mmlu_test")) is not None:
        write_mmlu(flat, path, out)
        written.append("mmlu")
    if not written:
        stems = ", ".join(f"{file.stem}.jsonl" for file in FLAT_FILES.values())
        held = ", ".join(sorted(p.name for p in flat.iterdir())) if flat.is_dir() else "no folder"
        raise ValueError(f"{flat} needs some of {stems}, mmlu_test.jsonl; it is or holds: {held}")
    return written


def write_mmlu(flat: Path, test: Path, out: Path) -> None:
    """A task for each subject, and the group of them."""
    dev = find_file(flat, "mmlu_dev")
    if dev is None:
        raise ValueError(f"{flat} has mmlu_test without mmlu_dev, which lm-eval reads as well")
    subjects: dict[str, dict[str, list[Record]]] = {}
    for split, path in (("test", test), ("dev", dev)):
        for record in read_records(path, _MMLU_FIELDS):
            subjects.setdefault(record["subject"], {"test": [], "dev": []})[split].append(record)
    for subject, splits in subjects.items():
        stock = f"mmlu/default/mmlu_{subject}.yaml"
        write_task(out, f"mmlu_{subject}", stock, splits, {"doc_to_target": "gold"})
    group = {"group": "mmlu", "task": [f"mmlu_{subject}" for subject in subjects]}
    (out / "mmlu.yaml").write_text(json.dumps(group))


def write_task(
    out: Path, name: str, stock: str, splits: dict[str, list[Record]], settings: dict[str, Any]
) -> None:
    """A task file (JSON is YAML) that includes lm-eval's own, and the records it reads."""
    files = {}
    for split, records in splits.items():
        file = out / f"{name}-{split}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        files[split] = str(file.resolve())
    task = {
        "include": str(STOCK_TASKS / stock),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    (out / f"{name}.yaml").write_text(json.dumps(task | settings))


def find_file(flat: Path, stem: str) -> Path | None:
    paths = [flat / f"{stem}.jsonl{packing}" for packing in ("", ".zst", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def read_records(
    path: Path, fields: Sequence[str], forms: Mapping[str, str] | None = None
) -> list[Record]:
    """The records of a file with these fields only. Raises ValueError naming a wrong line."""
    records = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            records.append(checked_record(json.loads(line), fields, forms or {}))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return records


def checked_record(record: Any, fields: Sequence[str], forms: Mapping[str, str]) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"not an object with fields but {type(record).__name__}")
    if missing := [name for name in fields if name not in record]:
        raise ValueError(f"no field {', '.join(missing)}; it has {', '.join(record)}")
    choices = record.get("choices", record.get("contexts", []))
    if "gold" in fields and record["gold"] not in range(len(choices)):
        raise ValueError(
            f"gold {record['gold']!r} is not the place of one of its {len(choices)} choices"
        )
    for name, form in forms.items():
        if not re.fullmatch(form, record[name], re.DOTALL):
            raise ValueError(f"{name} {record[name]!r} does not read {form!r}")
    return {name: record[name] for name in fields}


def read_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        try:
            yield from unpacked_lines(path, file)
        except damage_errors() as error:
            raise ValueError(f"{path} is damaged: {error}") from None


if __name__ == "__main__":
    main()
