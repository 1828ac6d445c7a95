"""mor explain"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from tyro.conf import Positional

from mor.cli.command import Command
from mor.cli.depth import parse_depth, parse_depths
from mor.settings import PositiveInt

if TYPE_CHECKING:
    from mor.analysis.explain import Explanation
    from mor.data.problems import Task
    from mor.data.tokenizer import Tokenizer
    from mor.model.transformer import Transformer
    from mor.training.config import TrainConfig

MAX_TOKENS = 2048  # about 3 MB of page for each model


class Explain(Command):
    """Write a page that shows, token by token, what a model did with a text: depths, scores,
    guesses after each recursion, and what another depth would have changed. One HTML file, readable
    offline. For a run on a task the text is one in its words, such as "=3 p0 p2", and the answers
    stand in place of next tokens."""

    checkpoint: Positional[Path]
    text: str | None = None
    file: Path | None = None
    """A text file instead of --text."""
    compare: Path | None = None
    """A second checkpoint, shown beside the first."""
    out: Path | None = None
    """Default: explain.html; with --json no page is written unless this is given."""
    window: PositiveInt | None = None
    """Tokens that are read together. Default: the length the model was trained with."""
    max_tokens: PositiveInt | None = None
    """Read only this many tokens of the text, counted by each model. Without it a text of more than
    2,048 tokens is refused."""
    corpus: Path | None = None
    """Text, or prepared data, of which the validation split is read: tokens are counted in it to
    tell rare from frequent ones. Default: the text itself."""
    depth: str | None = None
    """Mean depth, such as 2.2, 55% (of full depth) or full. Default: the model's own rule."""
    depths: str | None = None
    """Depths between which a slider on the page moves, such as 1.5,2,2.5,full. Default: a few, if
    the checkpoint was calibrated (mor calibrate)."""
    guesses: PositiveInt = 5
    """Guesses that are kept for each token and recursion."""
    device: str = "auto"
    """auto, cpu, cuda or another PyTorch device."""
    json: bool = False
    """Print everything that the page shows as JSON in the last line."""

    def run(self, console: Console) -> None:
        from mor.analysis.explain import shown
        from mor.analysis.page import render
        from mor.checkpoint import load
        from mor.device import pick_device

        text = self._text()
        out = self.out or (None if self.json else Path("explain.html"))
        if out and not out.parent.is_dir():
            raise ValueError(f"--out: {out.parent} is not a folder")
        if out and out.is_dir():
            raise ValueError(f"--out: {out} is a folder, and a file is needed")
        device = pick_device(self.device)
        loaded = [
            (path, load(path, device=device)) for path in (self.checkpoint, self.compare) if path
        ]
        for path, (_, _, tokenizer) in loaded:
            text = self._cut(text, tokenizer, path)
        found = [
            self._explain(path, model, tokenizer, text) for path, (_, model, tokenizer) in loaded
        ]
        page = render(found)  # refuses models that cannot be compared
        if out:
            out.write_text(page, encoding="utf-8")
            console.out(f"{out}: {len(page.encode()) / 1e6:.2f} MB", highlight=False)
        for e in found:
            score = (
                ""
                if e.nll is None
                else f" · {shown(e.nll, 3)} nats per {'answer' if e.asked == 'answer' else 'token'}"
            )
            depth = f"mean depth {shown(e.mean_depth, 2)}"
            line = f"{e.name}: {len(e.tokens):,} tokens · {depth}{score}"
            if not self.json:
                console.out(line, highlight=False)
        if self.json:
            print(json.dumps({"models": [e.to_dict() for e in found]}, allow_nan=False))

    def _text(self) -> str:
        if (self.text is None) == (self.file is None):
            raise ValueError("give the text to explain as --text TEXT or as --file FILE")
        if self.file is None:
            return self.text or ""
        try:
            return self.file.read_text(encoding="utf-8")
        except UnicodeError as error:
            raise ValueError(f"{self.file} is not valid UTF-8: {error}") from error

    def _cut(self, text: str, tokenizer: Tokenizer, checkpoint: Path) -> str:
        """The text, or the beginning that --max-tokens asks for."""
        _, pieces = tokenizer.encode_with_pieces(text)
        if self.max_tokens is None and len(pieces) > MAX_TOKENS:
            raise ValueError(
                f"{len(pieces):,} tokens of {checkpoint} are too many for a page; --max-tokens "
                f"{MAX_TOKENS} reads the beginning, mor report describes a whole corpus"
            )
        return "".join(pieces[: self.max_tokens])

    def _explain(
        self, checkpoint: Path, model: Transformer, tokenizer: Tokenizer, text: str
    ) -> Explanation:
        from mor.analysis.explain import explain
        from mor.training.config import settings_of

        run = settings_of(checkpoint)
        task = _task(run)
        return explain(
            model,
            tokenizer,
            text,
            name=str(checkpoint),
            window=self.window or (run.seq_len if run else None),
            guesses=self.guesses,
            counts=_counts(self.corpus, tokenizer) if self.corpus else None,
            answers=_answers(task, text, tokenizer) if task else None,
            task=task,
            depth=parse_depth(self.depth, model.config.num_recursions),
            depths=self._depths(model),
        )

    def _depths(self, model: Transformer) -> list[float | Literal["full"]]:
        from mor.model.budget import curve_depths

        if self.depths is not None:
            return parse_depths(self.depths, model.config.num_recursions)
        return [] if model.depth_table is None else curve_depths(model)


def _task(run: TrainConfig | None) -> Task | None:
    """The task that a run is on, if it is on one."""
    from mor.data.problems import PREFIX, parse_task

    path = (run.data.path if run else None) or ""
    return parse_task(path) if path.startswith(PREFIX) else None


def _answers(task: Task, text: str, tokenizer: Tokenizer) -> list[int]:
    """What is right at each token. Raises ValueError for words that the task does not have."""
    if unknown := [word for word in text.split() if word not in task.words()]:
        raise ValueError(
            f"the task has no word {unknown[0]!r}; its words are {' '.join(task.words()[1:])}"
        )
    return task.answers(tokenizer.encode(text))


def _counts(corpus: Path, tokenizer: Tokenizer) -> dict[int, int]:
    from mor.analysis.corpus import token_counts
    from mor.data.corpus import load_tokens

    return token_counts(load_tokens(corpus, tokenizer))
