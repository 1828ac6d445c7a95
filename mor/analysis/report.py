"""`mor report`: the analyses of a run as tables and figures, and one page of whatever a folder
holds of them.

A run or study folder may have ``figures/NAME.svg`` or ``.png`` and ``tables/NAME.csv``, written by
anyone; those of one name stand together; ``summary.json``, a flat table of texts, comes before
them. Pages contain everything and need no network.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from mor.analysis import corpus, figures
from mor.analysis.classes import LEAST
from mor.analysis.style import save
from mor.checkpoint import Checkpoint
from mor.data.problems import Task
from mor.data.stream import TaskData, Windows
from mor.data.word_problems import InTokens
from mor.evaluation.depth_curve import depth_curve
from mor.files import read_json
from mor.model.budget import curve_depths, has_table
from mor.run_folder import RunFolder

Rows = list[dict[str, Any]]
SUMMARY = "summary.json"
TABLE_ROWS = 40  # of a table on the page; the file has all
HALF_PAGE_PT = 560  # the widest drawing of which two stand beside each other


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A table and its figure, with what a reader needs to know. figure: None for a table alone."""

    title: str
    note: str
    figure: Callable[[Rows], Figure] | None = None


ENTRIES: dict[str, Entry] = {
    "loss": Entry(
        title="Loss", note="Validation is causal (threshold selection).", figure=figures.loss_curve
    ),
    "router_health": Entry(
        title="Router over training",
        note="Measured on training batches with top-k, the non-causal selection of training.",
        figure=figures.router_health,
    ),
    "depth_scaling": Entry(
        title="Test-time depth",
        note="Causal NLL with the depth capped. Beyond the trained depth the last router decides "
        "and gates again, on the new states: an extrapolation of the network, not something it "
        "was trained for.",
        figure=figures.depth_scaling,
    ),
    "depth_curve": Entry(
        title="Depth budgets",
        note="Causal NLL at budgets from the checkpoint's table of depths. Time: of reading whole "
        "windows on this machine, the best of three turns.",
        figure=figures.depth_curve,
    ),
    "depth_histogram": Entry(
        title="Depths taken", note="Threshold selection.", figure=figures.depth_histogram
    ),
    "depth_by_class": Entry(
        title="Depth by class of token",
        note="95% intervals, for which a window is one observation; none for fewer than "
        f"{LEAST} tokens. Frequency is counted in the text read.",
        figure=figures.depth_by_class,
    ),
    "depth_predictors": Entry(
        title="What decides the depth",
        note="How well a lookup table made from the first half of the windows predicts the depths "
        "in the second half.",
        figure=figures.depth_predictors,
    ),
    "counterfactual_gains": Entry(
        title="One recursion fewer or more",
        note="Each token is run again at another depth while the tokens before it stay as they "
        "were. Target: the next token, or the answer of a task. Better: the share of tokens "
        "that gain.",
        figure=figures.counterfactual_gains,
    ),
    "score_histogram": Entry(
        title="Router scores",
        note="Expert-choice: sigmoid of the logit that is compared with the threshold. "
        "Token-choice: share of each depth.",
        figure=figures.score_histogram,
    ),
    "separation": Entry(
        title="How binary the scores are", note="Share of scores within 0.1 of 0 or 1."
    ),
    "agreement": Entry(
        title="Threshold against top-k",
        note="Top-k is the selection of training; it compares a token with later ones and is not "
        "causal.",
        figure=figures.agreement,
    ),
    "dead_tokens": Entry(
        title="Dead tokens",
        note="Positions that no window took, and distinct tokens that never took it although read "
        "5 times or more.",
        figure=figures.dead_tokens,
    ),
    "drift": Entry(
        title="How states move",
        note="Stage 0 is before the first recursion. Only tokens that the later recursion changed.",
        figure=figures.drift,
    ),
    "kv_similarity": Entry(
        title="Keys and values across recursions",
        note="The same token at two recursions; keys as cached, rotated for its position.",
        figure=figures.kv_similarity,
    ),
}

LOSS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "validation_nll",
    "validation_bits_per_byte",
    "validation_mean_depth",
)
HEALTH = (
    "mean_depth",
    "share_per_recursion",
    "depth_entropy",
    "dead_positions",
    "agreement",
    "max_violation",
)


def run_tables(run: Path) -> dict[str, Rows]:
    """What the metrics of a run tell: the loss and, where there is a router, its health."""
    metrics = RunFolder(run).read_metrics()
    routed = [m for m in metrics if "depth_entropy" in m]
    found = {
        "loss": [_only(m, LOSS) for m in metrics],
        "router_health": [_only(m, ("step", *HEALTH)) for m in routed],
    }
    return {name: rows for name, rows in found.items() if rows}


def _only(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}


def analyses(
    loaded: Checkpoint,
    data: Windows,
    *,
    seq_len: int,
    max_windows: int,
    document_mask: bool = False,
) -> dict[str, Rows]:
    """Every analysis that fits the model, on up to ``max_windows`` windows; those with nothing to
    say are left out.

    document_mask: for the NLL by depth, as the model was trained; all else reads documents that see
    each other. Raises ValueError if a number is not finite.
    """
    reading = corpus.read(loaded.model, data, seq_len=seq_len, max_windows=max_windows)
    found: dict[str, Rows] = {}
    if has_table(loaded.model):
        curve = depth_curve(
            loaded.model,
            data,
            curve_depths(loaded.model),
            seq_len=seq_len,
            max_windows=max_windows,
            document_mask=document_mask,
        )
        found["depth_curve"] = [row.to_row() for row in curve]
    if loaded.config.num_recursions > 1:
        found["depth_scaling"] = corpus.depth_scaling(
            loaded.model,
            data,
            seq_len=seq_len,
            max_windows=max_windows,
            document_mask=document_mask,
        )
        found["counterfactual_gains"] = corpus.counterfactual_gains(reading)
    if loaded.config.family == "mor":
        found["depth_histogram"] = corpus.depth_histogram(reading)
        found["depth_by_class"] = corpus.depth_by_token_class(
            reading, loaded.tokenizer, task=_own_task(data)
        )
        found["depth_predictors"] = corpus.depth_predictors(reading)
        found["score_histogram"] = corpus.score_histogram(reading)
        found["separation"] = corpus.separation(found["score_histogram"])
        found["agreement"] = corpus.agreement(reading)
        found["dead_tokens"] = corpus.dead_tokens(reading)
    found["drift"] = corpus.drift(reading)
    found["kv_similarity"] = corpus.kv_similarity(reading)
    for name, rows in found.items():
        _require_finite(name, rows)
    return {name: rows for name, rows in found.items() if rows}


def _own_task(data: Windows) -> Task | None:
    """The task that the data are of, if its words have kinds of their own."""
    task = data.task if isinstance(data, TaskData) else None
    return None if isinstance(task, InTokens) else task


def _require_finite(table: str, rows: Rows) -> None:
    """Raise ValueError for a number that no figure could show."""
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{name} of {table} is {value}: the states of the model grow too large for "
                    "its numbers; take another checkpoint"
                )


def collapse(tables: dict[str, Rows]) -> str | None:
    """A note on a router that sends no token into a recursion; None for any other."""
    dead = [
        str(row["recursion"]) for row in tables.get("dead_tokens", []) if row["dead_positions"] == 1
    ]
    read = sum(row["tokens"] for row in tables.get("depth_histogram", []))
    return f"none of the {read:,} tokens takes recursion {' or '.join(dead)}" if dead else None


def write(folder: Path, tables: dict[str, Rows]) -> None:
    """Write tables/NAME.csv and figures/NAME.png and .svg; remove older ones of ``ENTRIES``."""
    for name in ENTRIES:
        for kind in ("tables/{}.csv", "figures/{}.png", "figures/{}.svg"):
            (folder / kind.format(name)).unlink(missing_ok=True)
    for name, rows in tables.items():
        write_table(rows, folder / "tables" / f"{name}.csv")
        figure = ENTRIES[name].figure
        if figure is not None:
            save(figure(rows), folder / "figures", name)


def write_table(rows: Rows, path: Path) -> None:
    """Rows as CSV, a column for every key in order of appearance; lists as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    n: json.dumps(v, allow_nan=False) if isinstance(v, list | dict) else v
                    for n, v in row.items()
                }
            )


def report_page(
    folder: Path,
    *,
    entries: Mapping[str, Entry] = ENTRIES,
    settings: dict[str, Any] | None = None,
) -> str:
    """HTML with every figure and table of ``folder``, known ones first and in the order of
    ``entries``.

    settings: shown at the top, after those of summary.json. Raises ValueError if there are no
    figures and no tables.
    """
    drawn = {
        p.stem: p for kind in ("png", "svg") for p in sorted((folder / "figures").glob(f"*.{kind}"))
    }
    listed = {p.stem: p for p in sorted((folder / "tables").glob("*.csv"))}
    names = [n for n in entries if n in drawn or n in listed]
    names += sorted((drawn.keys() | listed.keys()) - entries.keys())
    if not names:
        raise ValueError(
            f"{folder} has no figures/*.svg, figures/*.png or tables/*.csv, and is not a run with "
            "checkpoints"
        )
    known = {n: entries.get(n) or Entry(title=_as_title(n), note="") for n in names}
    parts = [_section(n, entry, drawn.get(n), listed.get(n)) for n, entry in known.items()]
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    own = files("mor.analysis.page")
    return Template((own / "report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(folder.resolve().name),
        style=(own / "report.css").read_text(encoding="utf-8"),
        settings=_definitions(summary | (settings or {})),
        contents="".join(
            f'<li><a href="#{html.escape(n)}">{html.escape(entry.title)}</a></li>'
            for n, entry in known.items()
        ),
        sections="\n".join(parts),
    )


def _as_title(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").capitalize()


def _section(name: str, entry: Entry, figure: Path | None, table: Path | None) -> str:
    """A figure with its table, across the page where the figure is wide."""
    wide = ' class="wide"' if figure and _is_wide(figure) else ""
    parts = [f'<section id="{html.escape(name)}"{wide}><h2>{html.escape(entry.title)}</h2>']
    if entry.note:
        parts.append(f'<p class="note">{html.escape(entry.note)}</p>')
    if figure:
        kind = "svg+xml" if figure.suffix == ".svg" else "png"
        data = base64.b64encode(figure.read_bytes()).decode()
        source = f"data:image/{kind};base64,{data}"
        alt = f"Figure: {html.escape(entry.title)}"
        parts.append(f'<div class="figure"><img alt="{alt}" src="{source}"></div>')
    if table:
        parts.append(_table(table, closed=figure is not None))
    return "\n".join([*parts, "</section>"])


def _is_wide(figure: Path) -> bool:
    """Whether it needs the whole width of the page. Only a drawing says how wide it is."""
    width = re.search(rb'<svg[^>]* width="([\d.]+)pt"', figure.read_bytes())
    return width is None or float(width[1]) > HALF_PAGE_PT


def _table(path: Path, *, closed: bool) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = list(csv.reader(file)) or [[]]
    shown = (
        rows
        if len(rows) <= TABLE_ROWS
        else [*rows[: TABLE_ROWS // 2], ["…"], *rows[-TABLE_ROWS // 2 :]]
    )
    head = "".join(f"<th>{html.escape(c.replace('_', ' '))}</th>" for c in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(_cell(c))}</td>' for c in row)}</tr>" for row in shown
    )
    label = f"{len(rows)} row{'' if len(rows) == 1 else 's'} · tables/{path.name}"
    opened = "" if closed else " open"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    summary = f"<summary>{html.escape(label)}</summary>"
    return f'<details{opened}>{summary}<div class="wide">{table}</div></details>'


def _cell(text: str) -> str:
    """Numbers with four significant digits, everything else as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return text if text.lstrip("-").isdigit() or not number else f"{number:.4g}"


def _definitions(settings: dict[str, Any]) -> str:
    rows: Sequence[tuple[str, Any]] = list(settings.items())
    return "".join(
        f"<div><dt>{html.escape(str(n))}</dt><dd>{html.escape(str(v))}</dd></div>" for n, v in rows
    )
