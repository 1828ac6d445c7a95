"""What a run folder or a checkpoint says about itself, for the commands that show it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mor import checkpoint
from mor.costs.flops import kv_bytes, non_embedding_params, unique_params
from mor.data.config import DataConfig
from mor.data.manifest import is_prepared
from mor.data.problems import PREFIX
from mor.data.word_problems import WORDS_PREFIX
from mor.model.config import ModelConfig
from mor.run_folder import RunFolder
from mor.settings import flat
from mor.training.config import TrainConfig, load_config, settings_of, total_steps

KV_DTYPE_BYTES = 2  # bfloat16


@dataclass(frozen=True, kw_only=True)
class Facts:
    """settings: None for a checkpoint outside a run. progress: counters of the newest checkpoint,
    or of the last line of metrics; empty before the first. validations: rows of its metrics."""

    path: Path
    model: ModelConfig
    settings: TrainConfig | None
    progress: dict[str, Any]
    validations: list[dict[str, Any]]
    checkpoints: list[Path]
    mfu: float | None = None
    """As last logged; None where the peak of the device is not known."""

    @property
    def total_steps(self) -> int | None:
        planned: int | None = self.progress.get("total_steps")
        if self.settings and (planned is None or self.settings.flops is None):
            return total_steps(self.settings)  # it may have been lengthened since the checkpoint
        return planned

    @property
    def finished(self) -> bool:
        done, total = self.progress.get("step"), self.total_steps
        return bool(self.checkpoints) and total is not None and done == total

    @property
    def last(self) -> dict[str, Any]:
        """The last validation; empty if there was none."""
        return self.validations[-1] if self.validations else {}

    @property
    def best(self) -> dict[str, Any]:
        return min(self.validations, key=lambda row: row["validation_nll"], default={})

    @property
    def kv_bytes_per_token(self) -> float:
        """With the measured shares of tokens at each recursion, or else the expected ones."""
        shares = self.last.get("validation_share_per_recursion") or self.model.capacities
        return kv_bytes(self.model, 1, shares, KV_DTYPE_BYTES)


def facts(path: Path) -> Facts:
    """Raises ValueError for a path that is neither a run nor a checkpoint."""
    run = RunFolder(path)
    if run.settings.is_file():
        return _of_run(run, load_config(run.settings))
    if run.checkpoints() and (settings := settings_of(path)):
        return _of_run(run, settings)
    folder = checkpoint.resolve(path)
    settings = settings_of(folder)
    of_run = _of_run(RunFolder.of(folder), settings) if settings else None
    progress = _progress(folder)
    rows = of_run.validations if of_run else []
    return Facts(
        path=path,
        model=checkpoint.read_config(folder),
        settings=of_run.settings if of_run else None,
        progress=progress,
        validations=[row for row in rows if row["step"] <= progress.get("step", 0)],
        checkpoints=[folder],
    )


def _of_run(run: RunFolder, settings: TrainConfig) -> Facts:
    checkpoints, rows = run.checkpoints(), run.read_metrics()
    progress: dict[str, Any] = _progress(checkpoints[-1]) if checkpoints else {}
    if rows and rows[-1]["step"] > progress.get("step", 0):
        counters = ("step", "tokens", "flops")
        progress |= {name: rows[-1][name] for name in counters if name in rows[-1]}
    return Facts(
        path=run.path,
        model=settings.model,
        settings=settings,
        progress=progress,
        validations=[row for row in rows if row.get("validation_nll") is not None],
        checkpoints=checkpoints,
        mfu=next((row["mfu"] for row in reversed(rows) if "mfu" in row), None),
    )


def _progress(folder: Path) -> dict[str, Any]:
    has_state = (folder / "training_state").is_dir()
    return checkpoint.load_progress(folder) if has_state else {}


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def model_facts(model: ModelConfig) -> dict[str, Any]:
    """Shape and routing in a few names; numbers are counts."""
    routed = model.router.kind != "fixed"
    adapted = f"LoRA of rank {model.lora_rank} from recursion {model.lora_from} on"
    return {
        "family": model.family,
        "layout": model.layout_name,
        **({"deepened": True} if model.deepened else {}),
        **({"adapters": adapted} if model.lora_rank else {}),
        "effective_layers": model.num_layers,
        "params": unique_params(model),
        "params_non_embedding": non_embedding_params(model),
        "width": model.dim,
        "heads": f"{model.num_heads} ({model.num_kv_heads} for keys and values)",
        "vocabulary": model.vocab_size,
        "context": model.max_seq_len,
        "router": model.router.kind,
        **({"gate": "its own" if model.deepened else model.router.gate} if routed else {}),
        **({"capacities": list(model.capacities)} if routed else {}),
        **({"kv_strategy": model.kv_strategy} if model.num_recursions > 1 else {}),
    }


def data_facts(data: DataConfig, *, init_from: str | None = None) -> dict[str, str]:
    """Text, tokenizer and validation text of a run, in words. init_from: the checkpoint that it
    started from, if it did."""
    tokenizer = f"that of {init_from}" if init_from else data.tokenizer or "bpe"
    validation = f"{data.validation_share:.1%} of the text"
    if (data.path or "").startswith(PREFIX):
        tokenizer, validation = "the task's own", "problems of its own"
    elif (data.path or "").startswith(WORDS_PREFIX):
        validation = "problems of its own"
    elif data.path and is_prepared(data.path):
        tokenizer, validation = "that of the prepared data", "the prepared split"
    return {
        "text": corpus_name(data),
        "tokenizer": tokenizer,
        "validation": data.validation_path or validation,
    }


def corpus_name(data: DataConfig) -> str:
    if data.path is None:
        return "Python's own documentation (the default; choose text with --data.path)"
    made = data.path.startswith((PREFIX, WORDS_PREFIX))
    return data.path if made else f"text of {data.path}"


def shown_settings(found: Facts) -> dict[str, Any]:
    """All settings by dotted name, without the folder; the model's alone outside a run."""
    values = asdict(found.settings) if found.settings else {}
    values |= {"model": asdict(found.model)}
    return {name: value for name, value in flat(values) if name != "out"}
