"""mor compare"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from mor.cli.command import Command
from mor.cli.show import cell, print_json

if TYPE_CHECKING:
    from mor.cli.describe import Facts

CLOSE_BUDGETS = 1.02  # largest ratio of training FLOPs that counts as equal


class Compare(Command):
    """Runs or checkpoints side by side: the settings in which they differ, sizes, budgets and
    scores, and whether the scores can be compared."""

    paths: Positional[tuple[Path, ...]]
    """Two or more runs or checkpoints."""
    json: bool = False

    def __post_init__(self) -> None:
        if len(self.paths) < 2:
            only = f", got only {self.paths[0]}; mor info shows one" if self.paths else ""
            raise ValueError(f"mor compare needs two or more runs or checkpoints{only}")

    def run(self, console: Console) -> None:
        from mor.cli.describe import facts

        found = [facts(path) for path in self.paths]
        differences, numbers = differing(found), [numbers_of(each) for each in found]
        notes = list(cautions(found))
        if self.json:
            names = [str(path) for path in self.paths]
            print_json([dict(runs=names, differing=differences, numbers=numbers, cautions=notes)])
            return
        made = Table("", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for path in self.paths:
            made.add_column(str(path), justify="right", overflow="fold")
        for name, values in differences.items():
            made.add_row(name, *map(cell, values))
        made.add_section()
        for name in numbers[0]:
            made.add_row(name, *(_shown(each[name]) for each in numbers))
        console.print(made)
        for note in notes:
            console.print(f"caution: {note}", highlight=False, soft_wrap=True)


def differing(found: Sequence[Facts]) -> dict[str, list[Any]]:
    """Settings that differ, with the value of each; None where there is none."""
    from mor.cli.describe import shown_settings

    settings = [shown_settings(each) for each in found]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name) for each in settings] for name in names}
    return {name: row for name, row in values.items() if any(v != row[0] for v in row)}


def numbers_of(found: Facts) -> dict[str, Any]:
    from mor.costs.flops import non_embedding_params, unique_params

    return {
        "params": unique_params(found.model),
        "params_non_embedding": non_embedding_params(found.model),
        "step": found.progress.get("step"),
        "tokens": found.progress.get("tokens"),
        "train_flops": found.progress.get("flops"),
        "validation_nll": found.last.get("validation_nll"),
        "bits_per_byte": _bits(found),
        "mean_depth": found.last.get("validation_mean_depth"),
        "kv_bytes_per_token": found.kv_bytes_per_token,
    }


def cautions(found: Sequence[Facts]) -> Iterator[str]:
    """Why the scores of these runs are not a fair comparison."""

    def differ(what: Callable[[Facts], Any]) -> bool:
        return len({repr(what(each)) for each in found}) > 1

    outside = [str(each.path) for each in found if each.settings is None]
    if outside:
        yield f"{', '.join(outside)} belongs to no run: its data and budget are unknown"
        return
    if other_tokens := differ(_tokenizer):
        lacking = any(each.validations and not _bits(each) for each in found)
        bits = (
            "there are not bits per byte for all of them"
            if lacking
            else "bits per byte is, though the windows hold different pieces of the text"
        )
        yield f"the tokenizers differ: NLL per token is not comparable; {bits}"
    recorded = all(each.progress.get("data") for each in found)
    text = partial(_fingerprint, of_tokens=not other_tokens) if recorded else _places
    if differ(text) or differ(_windows):
        yield "the validation data differ: neither NLL nor bits per byte is comparable"
    if 0 < len(old := [str(each.path) for each in found if _bytes_of_all(each.last)]) < len(found):
        yield (
            f"the bits per byte of {', '.join(old)} are of an earlier version, which divided by "
            "the bytes of all the validation text; mor eval gives today's"
        )
    if unfinished := [str(each.path) for each in found if not each.finished]:
        yield f"{', '.join(unfinished)} is not finished: its learning rate has not decayed"
    if unscored := [str(each.path) for each in found if not each.validations]:
        yield f"{', '.join(unscored)} was never validated"
    budgets = [each.progress.get("flops", 0.0) for each in found]
    if min(budgets) <= 0 or max(budgets) / min(budgets) > CLOSE_BUDGETS:
        shown = ", ".join(f"{budget:.3g}" for budget in budgets)
        yield f"the training FLOPs differ ({shown}): the budgets are unequal"


def _bits(found: Facts) -> float | None:
    bits: float | None = found.last.get("validation_bits_per_byte")
    return bits


def _bytes_of_all(row: Mapping[str, Any]) -> bool:
    """Whether a validation was written before the bytes that were scored were."""
    return row.get("validation_bits_per_byte") is not None and "validation_bytes" not in row


def _windows(found: Facts) -> Any:
    """How the validation text is read."""
    run = found.settings
    assert run is not None
    return run.data.document_mask, run.seq_len, run.eval_windows


def _fingerprint(found: Facts, *, of_tokens: bool) -> Any:
    """What the run has recorded of its validation text, wherever it lies; or only what is the same
    for any tokenizer."""
    recorded: dict[str, Any] = found.progress["data"]
    return {
        name: value
        for name, value in recorded.items()
        if name.startswith("validation.")
        and (of_tokens or not name.endswith((".tokens", ".sha256")))
    }


def _places(found: Facts) -> Any:
    """Where the validation text was, in runs of mor 0.1.0, which recorded nothing else."""
    run = found.settings
    assert run is not None
    data = run.data
    share = None if data.validation_path else data.validation_share
    return data.path, data.validation_path, data.text_field, share


def _tokenizer(found: Facts) -> Any:
    """The tokenizer itself where a checkpoint holds one, otherwise what was asked for."""
    for folder in found.checkpoints:
        if (file := folder / "tokenizer.json").is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.settings is not None
    data = found.settings.data
    return data.tokenizer, data.vocab_size, data.path


def _shown(value: Any) -> str:
    return "" if value is None else cell(value) if not _is_large(value) else f"{value:.3g}"


def _is_large(value: Any) -> bool:
    return isinstance(value, float) and abs(value) >= 1e6
