"""mor report"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from mor.cli.command import Command
from mor.run_folder import RunFolder
from mor.settings import PositiveInt


class Report(Command):
    """One HTML page of the figures and tables of a run or study.

    For a run the analyses are made first, on its validation text: loss, router, depths, scores,
    states, keys and values, test-time depth. Any other folder is shown as it is: its figures/ and
    tables/.
    """

    folder: Positional[Path]
    data: Path | None = None
    """Text or prepared data to analyse. Default: the validation text of the run."""
    max_windows: PositiveInt = 32
    """Windows of text that the analyses read."""
    seq_len: PositiveInt | None = None
    """Tokens in a window. Default: as in training."""
    analyse: bool = True
    """--no-analyse only collects what is there."""
    device: str = "auto"
    """auto, cpu, cuda or another PyTorch device."""
    out: Path | None = None
    """Default: report.html in the folder."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if not self.analyse:
            yield "data max_windows seq_len device", "with --no-analyse"
        elif not self._is_run():
            yield "data max_windows seq_len device analyse", f"because {self.folder} is no run"

    def _is_run(self) -> bool:
        return bool(RunFolder(self.folder).checkpoints())

    def run(self, console: Console) -> None:
        from mor.analysis.report import ENTRIES, report_page
        from mor.studies.captions import CAPTIONS

        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder; give a run or a study")
        out = self.out or self.folder / "report.html"
        if not out.parent.is_dir() or out.is_dir():
            raise ValueError(f"--out: {out} cannot be a file, which is needed here")
        settings = self._analyse() if self._is_run() and self.analyse else {}
        page = report_page(self.folder, entries=ENTRIES | CAPTIONS, settings=settings)
        out.write_text(page, encoding="utf-8")
        console.out(f"{out}: {out.stat().st_size / 1e6:.2f} MB", highlight=False)

    def _analyse(self) -> dict[str, Any]:
        from mor.analysis.report import analyses, collapse, run_tables, write
        from mor.checkpoint import load, resolve
        from mor.device import pick_device
        from mor.model.budget import has_depths, has_table
        from mor.training.config import settings_of
        from mor.training.validation import validation_of

        loaded = load(self.folder, device=pick_device(self.device))
        data, length, mask, name = validation_of(
            self.folder, loaded, self.data, seq_len=self.seq_len
        )
        tables = run_tables(self.folder)
        tables |= analyses(
            loaded, data, seq_len=length, max_windows=self.max_windows, document_mask=mask
        )
        write(self.folder, tables)
        run = settings_of(self.folder)
        last = next(
            (m for m in reversed(tables.get("loss", [])) if m.get("validation_nll") is not None), {}
        )
        settings = {
            "model": "MoR" if loaded.config.family == "mor" else loaded.config.family,
            "router": loaded.config.router.kind.replace("_", "-"),
            "recursions": loaded.config.num_recursions,
            "width": loaded.config.dim,
            "effective layers": loaded.config.num_layers,
            "checkpoint": resolve(self.folder).name,
            "text": name,
            "windows": f"{min(self.max_windows, data.num_windows(length))} × {length} tokens",
        }
        if has_depths(loaded.config) and not has_table(loaded.model):
            settings |= {"depth budgets": f"unknown; mor calibrate {self.folder} measures them"}
        if found := collapse(tables):
            settings |= {"router collapsed": found}
        if last:
            settings |= {"validation, nats per token (causal)": f"{last['validation_nll']:.4f}"}
        return settings | ({"seed": run.seed} if run else {})
