"""mor data"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg, subcommand

from mor.cli.command import Command
from mor.data.shards import PrepareConfig


class DataPrepare(Command):
    """Tokenize text into memory-mapped shards that training reads. Run it again to continue where
    it stopped.

    SOURCES are files (.txt, .jsonl, these as .gz or .zst, .parquet), folders of them, or
    hub:OWNER/NAME.
    """

    sources: Positional[tuple[str, ...]]
    out: Path
    settings: Annotated[PrepareConfig, arg(name="")] = field(default_factory=PrepareConfig)
    json: bool = False
    """Print the manifest without its shards as JSON in the last line."""

    def run(self, console: Console) -> None:
        from mor.data.shards import prepare

        _print_manifest(
            prepare(self.sources, self.out, self.settings, console=console),
            self.out,
            self.json,
            console,
        )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if self.settings.tokenizer != "bpe":
            yield "vocab_size bpe_megabytes", "with --tokenizer, unless that is bpe"
        if not any(source.startswith("hub:") for source in self.sources):
            yield "subset split", "without a hub:OWNER/NAME"


class DataInfo(Command):
    """What a prepared directory holds."""

    folder: Positional[Path]
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.data.manifest import read_manifest

        _print_manifest(read_manifest(self.folder), self.folder, self.json, console)


class Data(Command):
    """Token shards: prepare them, or look at them."""

    command: Annotated[
        Annotated[DataPrepare, subcommand("prepare")] | Annotated[DataInfo, subcommand("info")],
        arg(name=""),
    ]

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from self.command.without_effect()

    def run(self, console: Console) -> None:
        self.command.run(console)


def _print_manifest(
    manifest: dict[str, Any], folder: Path, as_json: bool, console: Console
) -> None:
    splits = {
        name: {k: v for k, v in s.items() if k != "shards"}
        for name, s in manifest["splits"].items()
    }
    tokenizer = manifest["settings"]["tokenizer"]
    made = Table(title=str(folder), title_justify="left")
    for name in ("split", "documents", "tokens", "bytes", "bytes/token"):
        made.add_column(name, justify="left" if name == "split" else "right")
    for name, s in splits.items():
        counts = (f"{s[key]:,}" for key in ("documents", "tokens", "bytes"))
        made.add_row(name, *counts, f"{s['bytes'] / s['tokens']:.2f}")
    console.print(made)
    console.print(
        f"tokenizer {tokenizer['asked']} ({tokenizer['vocab_size']:,} tokens, "
        f"{tokenizer['fingerprint']}) · "
        f"{manifest['empty']:,} empty documents and {manifest['broken']:,} broken records left out",
        highlight=False,
        soft_wrap=True,
    )
    if left_out := manifest.get("left_out"):
        console.print(f"left out in folders: {left_out}", highlight=False, soft_wrap=True)
    for problem in manifest["problems"]:
        console.print(f"  broken: {problem}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(manifest | {"splits": splits}))
