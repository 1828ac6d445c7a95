"""mor calibrate"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from mor.cli.command import Command
from mor.cli.show import print_json
from mor.data.manifest import is_prepared
from mor.settings import PositiveInt

if TYPE_CHECKING:
    from mor.data.stream import Windows
    from mor.data.tokenizer import Tokenizer
    from mor.model.budget import DepthTable


MOST_KINDS = 32
"""Columns that a table of what is spent may have for kinds of text."""


class Calibrate(Command):
    """Measure what each mean depth asks of a checkpoint's router, so that --depth can be had, and
    write it into the checkpoint. Half of the text is fitted to, the other half shows what is
    spent."""

    checkpoint: Positional[Path]
    """A run or checkpoint; an older table in it is replaced."""
    data: Path | None = None
    """Text that the model was not trained on, or prepared data. Default: the run's validation
    text."""
    text_field: str = "text"
    kind_field: str | None = None
    """A field of the records, such as source: also show what is spent on each kind alone."""
    check: tuple[Path, ...] = ()
    """Other text: show what is spent there, too."""
    deepest: PositiveInt | None = None
    """Recursions that a depth may go to. Default: twice the trained ones."""
    seq_len: PositiveInt | None = None
    """Tokens in a window. Default: as in training."""
    max_windows: PositiveInt | None = None
    """Windows in each half. Default: as many as hold 8,192 tokens."""
    device: str = "auto"
    """auto, cpu, cuda or another PyTorch device."""
    json: bool = False

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if self.data is None:
            yield "kind_field", "without --data"
            if not self.check:
                yield "text_field", "without --data or --check"
        elif is_prepared(self.data):
            yield "text_field kind_field", "with prepared data"

    def run(self, console: Console) -> None:
        from mor.checkpoint import load, write_depth_table
        from mor.device import pick_device
        from mor.evaluation.calibrate import calibrate
        from mor.progress import ProgressBar
        from mor.training.validation import validation_of

        loaded = load(self.checkpoint, device=pick_device(self.device))
        data, length, mask, name = validation_of(
            self.checkpoint, loaded, self.data, text_field=self.text_field, seq_len=self.seq_len
        )
        kinds = dict(self._kinds(loaded.tokenizer))
        with ProgressBar(console, "calibrating", total=1.0) as bar:
            table = calibrate(
                loaded.model,
                data,
                seq_len=length,
                max_windows=self.max_windows,
                deepest=self.deepest,
                kinds=kinds,
                document_mask=mask,
                step=lambda done: bar.update(done=done),
            )
        place = write_depth_table(self.checkpoint, table)
        if self.json:
            shown = {"reachable": table.reachable(), "checked": table.checked}
            print_json([{"checkpoint": str(place), **shown, "spent": table.spent}])
            return
        title = f"{place}\nfitted to {table.tokens:,} tokens of {name}"
        console.print(title, style="italic", highlight=False, soft_wrap=True)
        console.print(_table(table))
        console.print(f"depths that can be had: {table.shown()}", highlight=False)

    def _kinds(self, tokenizer: Tokenizer) -> Iterator[tuple[str, Windows]]:
        from mor.data.corpus import load_tokens, tokenize
        from mor.data.readers import has_fields
        from mor.data.sources import FileSource, find_sources, read_documents

        if self.kind_field is not None:
            assert self.data is not None
            for source in find_sources([self.data])[0]:
                if isinstance(source, FileSource) and not has_fields(source.path):
                    raise ValueError(
                        f"--kind-field {self.kind_field}: {source.path} is plain text, which has "
                        "no fields; kinds are told apart in records, such as those of .jsonl"
                    )
            documents = read_documents(self.data, self.text_field)
            own_kind = {d.name: d.text for d in read_documents(self.data, self.kind_field)}
            kinds = sorted(set(own_kind.values()))
            if len(kinds) > MOST_KINDS:
                raise ValueError(
                    f"--kind-field {self.kind_field}: {len(kinds):,} kinds, the first "
                    f"{kinds[0][:40]!r}; a table has room for {MOST_KINDS}, so take a field with "
                    "few values"
                )
            for kind in kinds:
                own = [d for d in documents if own_kind.get(d.name) == kind]
                if own:
                    yield kind, tokenize(own, tokenizer, kind)
        for path in self.check:
            yield str(path), load_tokens(path, tokenizer, self.text_field)


def _table(table: DepthTable) -> Table:
    made = Table(box=SIMPLE_HEAD, padding=0)
    made.add_column("depth", justify="right")
    for kind in table.spent:
        made.add_column(kind, justify="right", overflow="fold")
    for i, budget in enumerate(table.checked):
        spent = _row(table.spent, i)
        shown = [f"{x:.3f} ({100 * (x / budget - 1):+.1f}%)" for x in spent]
        made.add_row(f"{budget:g}", *shown)
    return made


def _row(spent: Mapping[str, tuple[float, ...]], place: int) -> list[float]:
    return [each[place] for each in spent.values()]
