"""mor demo | data | train | eval | generate | costs"""

from __future__ import annotations

import json
import sys
import tomllib
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg, subcommand

from mor.config import KVStrategyName, ModelConfig, RouterKind, Selection, Sharing, from_dict, preset
from mor.shards import PrepareConfig
from mor.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model: a preset and the paper's layout for a number of recursions."""

    preset: str = "mini"
    """tiny, mini, small, smollm-135m, smollm-360m, smollm-730m or smollm-1.7b."""
    num_recursions: int = 3
    """Times the shared layers are applied; 1 is a vanilla Transformer."""
    router: RouterKind | None = None
    """Default: expert_choice with several recursions, fixed with one."""
    sharing: Sharing = "middle_cycle"
    kv_strategy: KVStrategyName = "recursion_wise"
    num_layers: int | None = None
    """Effective depth. Default: the preset's, rounded up to one that the sharing scheme allows."""

    def build(self) -> ModelConfig:
        return preset(
            self.preset,
            num_recursions=self.num_recursions,
            sharing=self.sharing,
            num_layers=self.num_layers,
            router=self.router or ("expert_choice" if self.num_recursions > 1 else "fixed"),
            kv_strategy=self.kv_strategy,
        )


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train vanilla, recursive, MoR and a control at equal FLOPs on real text; compare; sample."""

    out: Path = Path("runs/demo")
    flops: float = 3e12
    """Training FLOPs of each of the four models."""
    seed: int = 0
    json: bool = False
    """Print the table as JSON in the last line."""

    def run(self, console: Console) -> None:
        from mor.demo import run_demo

        rows = run_demo(self.out, flops=self.flops, seed=self.seed, console=console)
        if self.json:
            print(json.dumps([asdict(row) for row in rows]))


@dataclass(frozen=True, kw_only=True)
class DataPrepare:
    """Tokenize text into memory-mapped shards that training reads. Run it again to continue where it stopped.

    SOURCES are files (.txt, .jsonl, these as .gz or .zst, .parquet), folders of them, or hub:OWNER/NAME.
    """

    sources: Positional[tuple[str, ...]]
    out: Path
    settings: Annotated[PrepareConfig, arg(name="")] = field(default_factory=PrepareConfig)
    json: bool = False
    """Print the manifest without its shards as JSON in the last line."""

    def run(self, console: Console) -> None:
        from mor.shards import prepare

        _print_manifest(prepare(self.sources, self.out, self.settings, console=console), self.out, self.json, console)


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What a prepared directory holds."""

    folder: Positional[Path]
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.shards import read_manifest

        _print_manifest(read_manifest(self.folder), self.folder, self.json, console)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Token shards: prepare them, or look at them."""

    command: Annotated[
        Annotated[DataPrepare, subcommand("prepare")] | Annotated[DataInfo, subcommand("info")], arg(name="")
    ]

    def run(self, console: Console) -> None:
        self.command.run(console)


def _print_manifest(manifest: dict[str, Any], folder: Path, as_json: bool, console: Console) -> None:
    splits = {name: {k: v for k, v in s.items() if k != "shards"} for name, s in manifest["splits"].items()}
    tokenizer = manifest["settings"]["tokenizer"]
    made = Table(title=str(folder), title_justify="left")
    for name in ("split", "documents", "tokens", "bytes", "bytes/token"):
        made.add_column(name, justify="left" if name == "split" else "right")
    for name, s in splits.items():
        counts = (f"{s[key]:,}" for key in ("documents", "tokens", "bytes"))
        made.add_row(name, *counts, f"{s['bytes'] / s['tokens']:.2f}")
    console.print(made)
    console.print(
        f"tokenizer {tokenizer['asked']} ({tokenizer['vocab_size']:,} tokens, {tokenizer['fingerprint']}) · "
        f"{manifest['empty']:,} empty documents and {manifest['broken']:,} broken records left out",
        highlight=False,
        soft_wrap=True,
    )
    for problem in manifest["problems"]:
        console.print(f"  broken: {problem}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(manifest | {"splits": splits}))


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model. Settings come from --config (TOML), then the model choice, then single flags."""

    config: Path | None = None
    """TOML file with the settings below; an earlier run's train.json works too."""
    resume: bool = False
    """Continue the run in --out with the settings it was started with."""
    cooldown_steps: int | None = None
    """With --branch-from: steps in which the learning rate decays from there to its end."""
    choice: Annotated[ModelChoice, arg(name="")] = field(default_factory=ModelChoice)
    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)

    def run(self, console: Console) -> None:
        from mor.train import branch, load_config, train

        settings = self.settings
        if self.cooldown_steps is not None and settings.branch_from is not None:
            settings = branch(settings.branch_from, cooldown_steps=self.cooldown_steps, out=settings.out)
        if self.resume:
            saved = Path(settings.out) / "train.json"
            if not saved.is_file():
                raise ValueError(f"{settings.out} holds no run to resume (no train.json)")
            settings = replace(load_config(saved), out=settings.out)
        result = train(settings, resume=self.resume, console=console)
        console.print(f"checkpoint: {result.path}", highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """NLL, perplexity and bits per byte of a checkpoint, causal unless asked otherwise."""

    checkpoint: Positional[Path]
    data: Path | None = None
    """A file or folder of text, or prepared data, evaluated whole. Default: the validation text of the run."""
    text_field: str = "text"
    routing: Selection = "threshold"
    """topk is the paper's evaluation: it sees the future, and the result is labelled non-causal."""
    by_depth: bool = False
    """One row for each cap on the depth."""
    seq_len: int | None = None
    max_windows: int | None = None
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.checkpoint import load
        from mor.evaluate import Evaluation, evaluate, leak

        config, model, tokenizer = load(self.checkpoint)
        length, mask, data = self._data(tokenizer, config)
        caps = range(1, config.num_recursions + 1) if self.by_depth else [config.num_recursions]
        rows: list[Evaluation] = []
        for cap in caps:
            settings: dict[str, Any] = dict(
                seq_len=length, max_windows=self.max_windows, max_depth=cap, document_mask=mask
            )
            rows += leak(model, data, **settings) if self.routing == "topk" else [evaluate(model, data, **settings)]
        if self.json:
            _print_json([asdict(row) for row in rows])
            return
        title = f"{self.checkpoint}: {rows[0].tokens:,} tokens in windows of {length}"
        made = Table(title=title, title_justify="left")
        made.add_column("routing", no_wrap=True)
        for name in ("max depth", "NLL", "perplexity", "bits/byte", "mean depth", "leak, nats"):
            made.add_column(name, justify="right")
        for row in rows:
            figures = (row.nll, row.perplexity, row.bits_per_byte, row.mean_depth, row.leak_nats)
            label = row.selection if row.causal else f"{row.selection}, non-causal"
            made.add_row(label, str(row.max_depth), *("" if x is None else _cell(x) for x in figures))
        console.print(made)

    def _data(self, tokenizer: Any, config: ModelConfig) -> tuple[int, bool, Any]:
        """Window length, whether documents are masked (as in the run), and the text."""
        from mor.checkpoint import resolve
        from mor.data import DataConfig, load_corpus, load_tokens
        from mor.train import load_config

        saved = resolve(self.checkpoint).parent.parent / "train.json"
        run = load_config(saved) if saved.is_file() else None
        length = self.seq_len or (run.seq_len if run else config.max_seq_len)
        mask = run.data.document_mask if run else False
        if self.data:
            return length, mask, load_tokens(self.data, tokenizer, self.text_field)
        return length, mask, load_corpus(run.data if run else DataConfig(), tokenizer).validation


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with a checkpoint."""

    checkpoint: Positional[Path]
    prompt: str
    max_new_tokens: int = 100
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the likeliest tokens up to this probability."""
    seed: int = 0
    max_depth: int | None = None
    """Cap on every token's recursions."""
    show_depth: bool = False
    """Colour each token by its recursion depth."""
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.checkpoint import load
        from mor.generate import SamplingParams, generate, stream
        from mor.show import depth_legend, depth_text

        config, model, tokenizer = load(self.checkpoint)
        params = SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop_token_ids=(tokenizer.end_of_text_id,),
        )
        ids = tokenizer.encode(self.prompt) or [tokenizer.end_of_text_id]
        if not self.show_depth and not self.json:
            print(self.prompt, end="", flush=True)
            new: list[int] = []
            shown = ""
            for event in stream(model, [ids], params, max_depth=self.max_depth):
                new.append(event.token_id)
                text = tokenizer.decode(new)
                if not text.endswith("\ufffd") or event.finish_reason:  # wait for the rest of a character
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
            print()
            return
        result = generate(model, [ids], params, max_depth=self.max_depth)[0]
        if self.json:
            print(
                json.dumps(
                    {
                        "prompt": self.prompt,
                        "text": tokenizer.decode(result.token_ids),
                        **asdict(result),
                        "mean_depth": result.mean_depth,
                    }
                )
            )
            return
        console.print(depth_legend(config.num_recursions, console))
        console.print(depth_text(tokenizer, result, console), soft_wrap=True)
        console.print(f"mean depth {result.mean_depth:.2f} of {config.num_recursions}", highlight=False)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Parameters, FLOPs and KV bytes of a model, before training it."""

    choice: Annotated[ModelChoice, arg(name="")] = field(default_factory=lambda: ModelChoice(preset="smollm-360m"))
    context: int | None = None
    """Sequence length; the preset's maximum if not given."""
    kv_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.costs import costs

        found = costs(self.choice.build(), context=self.context, kv_dtype_bytes=4 if self.kv_dtype == "float32" else 2)
        _print_rows([asdict(found)], self.json, console, title=self.choice.preset)


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Costs, subcommand("costs")]
)


def _print_json(rows: list[dict[str, Any]]) -> None:
    print(json.dumps(rows[0] if len(rows) == 1 else rows))


def _print_rows(rows: list[dict[str, Any]], as_json: bool, console: Console, *, title: str) -> None:
    """JSON in one line (an object for one row), or a table with a column for each row."""
    if as_json:
        _print_json(rows)
        return
    made = Table(title=title, title_justify="left", show_header=False)
    for name in rows[0]:
        made.add_row(name, *(_cell(row[name]) for row in rows))
    for column in made.columns[1:]:
        column.justify = "right"
    console.print(made)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 1e4 else f"{value:,.0f}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _train_defaults(arguments: list[str]) -> Train:
    """Defaults of `mor train` as its --config and model choice make them, so that single flags refine those."""

    @dataclass(frozen=True, kw_only=True)
    class Start:
        config: Path | None = None
        choice: Annotated[ModelChoice, arg(name="")] = field(default_factory=ModelChoice)

    given = {a.split("=")[0].removeprefix("--").replace("-", "_") for a in arguments if a.startswith("--")}
    for mode, allowed in {"resume": ["out"], "branch_from": ["cooldown_steps", "out"]}.items():
        if mode in given and (ignored := given - {mode, "help", *allowed}):
            flags, takes = (", ".join(map(_flag, names)) for names in (sorted(ignored), allowed))
            raise ValueError(
                f"{_flag(mode)} keeps the settings the run was started with and takes only {takes}; leave out {flags}"
            )
    if ("branch_from" in given) != ("cooldown_steps" in given):
        raise ValueError("--branch-from CHECKPOINT and --cooldown-steps N go together")
    start, _ = tyro.cli(Start, args=arguments, return_unknown_args=True, add_help=False)
    if start.config is None:
        settings = TrainConfig(model=start.choice.build())
    else:
        values = start.config.read_text()
        settings = from_dict(
            TrainConfig, tomllib.loads(values) if start.config.suffix == ".toml" else json.loads(values)
        )
        if given & set(ModelChoice.__dataclass_fields__):
            settings = replace(settings, model=start.choice.build())
    return Train(config=start.config, choice=start.choice, settings=settings)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Mistakes of the user end in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        if arguments[:1] == ["train"]:
            rest = arguments[1:]
            tyro.cli(Train, args=rest, default=_train_defaults(rest), prog="mor train").run(console)
        else:
            tyro.cli(Command, args=arguments, prog="mor", description=__doc__).run(console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
