"""What finished runs found, and one SQLite table of them, made anew from the run folders."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from mor.analysis.early_exit import early_exits
from mor.costs import flops as costs
from mor.data.stream import TaskData, Windows
from mor.evaluation.nll import by_hops, evaluate
from mor.files import read_json, replacing
from mor.model.config import ModelConfig
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.studies.study import ABOUT, ERROR, LABEL, RESULT, Run
from mor.training.config import load_config
from mor.training.loop import TrainResult

TABLE = "results.sqlite"
# What tables, figures and fits read of a result.
NEEDED = (
    "validation_nll",
    "mean_depth",
    "family",
    "params",
    "looped_params",
    "tokens",
    "train_flops",
    "train_s",
)
HEALTH = ("dead_positions", "agreement", "max_violation", "depth_entropy")


def measure(run: Run, result: TrainResult) -> dict[str, Any]:
    """Numbers of a finished run, causal unless the name says non-causal. NLL in nats."""
    model, data = result.state.model.eval(), result.corpus.validation
    folder = RunFolder(Path(run.config.out))
    config = load_config(folder.settings)
    settings: dict[str, Any] = dict(
        seq_len=config.seq_len, max_windows=run.windows, document_mask=config.data.document_mask
    )
    causal = evaluate(model, data, **settings)
    router = model.router
    state = result.state
    return {
        "validation_nll": causal.nll,
        "bits_per_byte": causal.bits_per_byte,
        "mean_depth": causal.mean_depth,
        "share_per_recursion": causal.share_per_recursion,
        "topk_nll_noncausal": evaluate(model, data, selection="topk", **settings).nll
        if router.has_topk
        else None,
        "nll_by_max_depth": _by_depth(model, data, settings),
        **_health(folder),
        **model_facts(config.model),
        "steps": state.step,
        "tokens": state.tokens,
        "train_flops": state.flops,
        "train_s": state.train_s,
        "skipped_steps": state.skipped,
        **(by_hops(model, data, **settings) if isinstance(data, TaskData) else {}),
        **({"exits": early_exits(model, data, **settings)} if run.exits else {}),
    }


def _health(run: RunFolder) -> dict[str, Any]:
    """How the router did at the end of training (see Router.health): means over the last
    tenth of what was logged."""
    rows = [row for row in run.read_metrics() if "loss" in row]
    rows = rows[-max(1, len(rows) // 10) :]
    logged = {name: [row[name] for row in rows if row.get(name) is not None] for name in HEALTH}
    return {name: fmean(values) for name, values in logged.items() if values}


def _by_depth(model: Transformer, data: Windows, settings: dict[str, Any]) -> list[float]:
    caps = range(1, model.config.num_recursions + 1)
    return [evaluate(model, data, max_depth=cap, **settings).nll for cap in caps]


def model_facts(config: ModelConfig) -> dict[str, Any]:
    """Family, layout and parameters, without embeddings where the name does not say otherwise.
    looped_params: those of the shared stack; 0 for a model that applies it once."""
    shared = (
        costs.non_embedding_params(config.replace(prelude_layers=0, coda_layers=0)) - config.dim
    )
    shared -= costs.router_params(config)
    return {
        "family": config.family,
        "layout": config.layout_name,
        "params": costs.non_embedding_params(config),
        "looped_params": shared if config.num_recursions > 1 else 0,
        "params_with_embeddings": costs.unique_params(config),
    }


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def collect(study: Path) -> list[dict[str, Any]]:
    """A row for every run directory of a study: settings, place in the study, status, numbers.

    Raises ValueError for a damaged file, and for two directories that hold the same run.
    """
    rows = [_row(path.parent) for path in sorted(study.glob(f"*/**/{ABOUT}"))]
    taken: dict[tuple[Any, ...], str] = {}
    for row in [row for row in rows if row["stage"] != "tuning"]:
        other = taken.setdefault((row["row"], row["seed"], row["budget"]), row["path"])
        if other != row["path"]:
            raise ValueError(
                f"{other} and {row['path']} hold the same run; move one out of the study's folder"
            )
    return rows


def _row(path: Path) -> dict[str, Any]:
    about = known(path / ABOUT, "row", "variant", "stage", "seed", "budget", "labels")
    row: dict[str, Any] = {"path": str(path), "status": "unfinished", "reason": None}
    labels = about["labels"].items()
    row |= {k: about[k] for k in ("row", "variant", "stage", "seed", "budget")} | {
        LABEL + k: v for k, v in labels
    }
    settings = RunFolder(path).settings
    if settings.is_file() or (path / RESULT).is_file():
        row |= {
            f"config_{k.replace('.', '_')}": v
            for k, v in flat(asdict(load_config(settings))).items()
        }
    if (path / RESULT).is_file():
        row |= {"status": "finished"} | known(path / RESULT, *NEEDED)
    # A finished run can fail, too: when the study asks for another run in its place.
    if (path / ERROR).is_file():
        row |= {
            "status": "failed",
            "reason": next(iter((path / ERROR).read_text().splitlines()), "unknown"),
        }
    return row


def known(path: Path, *names: str) -> dict[str, Any]:
    """A JSON file that has these entries. Raises ValueError if one is missing."""
    values = read_json(path)
    if missing := [name for name in names if name not in values]:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; delete it and start the study again, which "
            "makes a new one"
        )
    return values


def write_tables(path: Path, **tables: Sequence[dict[str, Any]]) -> None:
    """Write these tables; lists and nested tables become JSON. With pandas:
    ``read_sql("select * from runs", sqlite3.connect(path))``."""
    with replacing(path) as unfinished, closing(sqlite3.connect(unfinished)) as database, database:
        for table, rows in tables.items():
            columns = list(dict.fromkeys(name for row in rows for name in row)) or ["path"]
            places = ", ".join("?" * len(columns))
            values = [[_plain(row.get(name)) for name in columns] for row in rows]
            database.execute(f"create table {table} ({', '.join(map(_quoted, columns))})")
            database.executemany(f"insert into {table} values ({places})", values)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def finished(rows: Iterable[dict[str, Any]], *stages: str) -> list[dict[str, Any]]:
    """Finished runs of these stages whose NLL is a number."""
    done = [row for row in rows if row["status"] == "finished" and row["stage"] in stages]
    return [row for row in done if math.isfinite(row["validation_nll"])]


def tuned_rates(rows: Iterable[dict[str, Any]], rates: Sequence[float]) -> dict[str, float]:
    """For each row of the study, the one of these learning rates whose short run has the lowest
    causal validation NLL."""
    best: dict[str, dict[str, Any]] = {}
    for row in finished(rows, "tuning"):
        if row.get("config_optim_lr") not in rates:  # of an earlier version of the file
            continue
        if row["row"] not in best or row["validation_nll"] < best[row["row"]]["validation_nll"]:
            best[row["row"]] = row
    return {name: row["config_optim_lr"] for name, row in best.items()}
