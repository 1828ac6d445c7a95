"""Training end to end on a small corpus: learns, resumes bit for bit, says what is wrong."""

import importlib
import io
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from mor import checkpoint
from mor.cli.describe import facts
from mor.cli.info import describe
from mor.costs.flops import train_flops
from mor.files import remove_folder
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig, load_config
from mor.training.loop import TrainingError, train
from mor.training.optim import OptimConfig
from mor.training.resume import Saved, branch
from tests.training.small_run import (
    BY_GAIN,
    LOSS_FREE,
    WITH_EXITS,
    metrics,
    poisoned,
    quiet,
    settings,
)


@pytest.mark.parametrize(
    "router", ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]
)
def test_every_family_learns(squares, tmp_path, router):
    result = train(settings(squares, tmp_path / "run", router, steps=40), console=quiet())
    log = metrics(tmp_path / "run")
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    validation = [row for row in log if "validation_nll" in row]
    assert validation[-1]["validation_bits_per_byte"] < validation[0]["validation_bits_per_byte"]
    assert result.finished and result.state.step == 40 and result.state.tokens == 40 * 4 * 32


@pytest.mark.parametrize(
    ("router", "beside"), [("expert_choice", {}), (LOSS_FREE, {}), (BY_GAIN, WITH_EXITS)]
)
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(squares, tmp_path, router, beside):
    common = dict(save_every=5, accumulate=2) | beside
    whole = train(settings(squares, tmp_path / "whole", router, **common), console=quiet())
    part = settings(squares, tmp_path / "part", router, **common)
    train(part, console=quiet())
    # as if killed after step 10
    remove_folder(RunFolder(tmp_path / "part").checkpoint(12))
    resumed = train(part, resume=True, console=quiet())
    ours, theirs = resumed.state.model.state_dict(), whole.state.model.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    same = ("step", "loss", "validation_nll", "flops", "tokens")
    assert [[row.get(k) for k in same] for row in metrics(tmp_path / "part")] == [
        [row.get(k) for k in same] for row in metrics(tmp_path / "whole")
    ]


def test_ctrl_c_saves_and_the_run_can_go_on(squares, tmp_path, monkeypatch):
    config = settings(squares, tmp_path / "run")
    import mor.training.loop as module

    real, steps = module.train_step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(module, "train_step", interrupted)
    result = train(config, console=quiet())
    assert not result.finished and result.state.step == 5 and result.path.name == "step-00000005"
    resumed = train(config, resume=True, console=quiet())
    assert resumed.finished and resumed.state.step == 12


def test_sigterm_saves_as_ctrl_c_does(squares, tmp_path, monkeypatch):
    import mor.training.loop as module

    real = module.train_step

    def terminated(*arguments):
        if arguments[1].step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(module, "train_step", terminated)
    result = train(settings(squares, tmp_path / "run"), console=quiet())
    assert not result.finished and result.state.step == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_without_a_checkpoint_yet_resumes_at_its_beginning(squares, tmp_path):
    config, console = settings(squares, tmp_path / "run", steps=3), quiet()
    whole = train(config, console=quiet())
    remove_folder(whole.path)
    again = train(config, resume=True, console=console)
    assert "starting at its beginning" in console.file.getvalue()
    for a, b in zip(again.state.model.parameters(), whole.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_that_stay_not_finite_stop_the_run_with_the_last_good_checkpoint(
    squares, tmp_path, monkeypatch
):
    poisoned(monkeypatch, range(6, 100))
    with pytest.raises(
        TrainingError,
        match=r"step 8: its loss is not finite, and 3 steps in a row were skipped \(loss nan, "
        r"gradient norm .*, learning rate 0.003\). The last good checkpoint is .*step-00000004. "
        r"Lower optim.lr \(now 0.003\) or lengthen optim.warmup in a new run, or from that one on "
        r"with --branch-from .*step-00000004 --steps N --optim.lr X --out FOLDER$",
    ):
        train(settings(squares, tmp_path / "run", save_every=4, max_skipped=3), console=quiet())
    assert (
        RunFolder(tmp_path / "run").newest_intact(checkpoint.check_to_continue).name
        == "step-00000004"
    )


@pytest.mark.parametrize("steps", [1, 12])
def test_weights_that_explode_are_never_saved_and_the_rate_is_to_blame(squares, tmp_path, steps):
    explosive = OptimConfig(lr=1e30, warmup=0.0, cooldown=0.0)
    with pytest.raises(TrainingError, match=r"learning rate 1e\+30\). .*Lower optim.lr") as error:
        train(settings(squares, tmp_path / "run", optim=explosive, steps=steps), console=quiet())
    said = str(error.value)
    assert "No checkpoint was saved" in said and "router" not in said and "branch" not in said
    assert RunFolder(tmp_path / "run").checkpoints() == []
    train(settings(squares, tmp_path / "run", steps=1), console=quiet())  # the corrected command


def test_weights_that_are_not_finite_stop_the_run_at_once(squares, tmp_path, monkeypatch):
    import mor.training.loop as module

    real = module.train_step

    def spoilt(config, state, *others):
        result = real(config, state, *others)
        if state.step == 6:
            next(state.model.parameters()).data[0] = math.inf
        return result

    monkeypatch.setattr(module, "train_step", spoilt)
    config = settings(squares, tmp_path / "run", save_every=3, eval_every=100)
    with pytest.raises(
        TrainingError, match=r"step 6: its weights are not .* is .*step-00000003\. "
    ):
        train(config, console=quiet())
    config = settings(squares, tmp_path / "late", save_every=5, eval_every=100)
    with pytest.raises(
        TrainingError,
        match=r"step 7: its weights are not finite \(loss nan, .* is .*step-00000005\. ",
    ):
        train(config, console=quiet())
    monkeypatch.undo()
    assert [p.name for p in RunFolder(tmp_path / "late").checkpoints()] == ["step-00000005"]
    assert train(config, resume=True, console=quiet()).finished


@pytest.fixture
def saved_before(squares, tmp_path, monkeypatch):
    """Train while these steps fail; returns the run's folder and its error, if any."""

    def trained(steps, **settings_):
        run = RunFolder(tmp_path / "run")
        with monkeypatch.context() as patch:
            poisoned(patch, steps)
            try:
                train(settings(squares, run.path, **settings_), console=quiet())
            except TrainingError as error:
                return run, str(error)
        return run, ""

    return trained


def test_nothing_is_saved_between_steps_that_are_skipped(saved_before, monkeypatch):
    clock(monkeypatch, step_s=1000.0)  # one is due at every step
    run, said = saved_before(range(5, 10), save_every=2, keep=2, max_skipped=5)
    assert run.checkpoints() == [run.checkpoint(3), run.checkpoint(4)]
    assert f"The last good checkpoint is {run.checkpoint(4)}. " in said


def test_a_checkpoint_between_skipped_steps_is_not_called_good_and_costs_no_other(
    saved_before, squares
):
    """One that was promised, and the one at an end."""
    run, _ = saved_before([7, 11, 12], save_every=2, keep=1, keep_steps=(7,), max_skipped=3)
    steps = {path.name[-2:]: Saved.of(path).skipped_in_a_row for path in run.checkpoints()}
    assert steps == {"07": 1, "10": 0, "12": 2}
    config = settings(squares, run.path, steps=20, max_skipped=3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as error:
        poisoned(patch, [1])
        train(config, resume=True, console=quiet())
    assert "step 13: its loss is not finite, and 3 steps in a row" in str(error.value)
    assert f"The last good checkpoint is {run.checkpoint(10)}. " in str(error.value)


def test_a_branch_without_a_checkpoint_of_its_own_goes_back_to_where_it_began(
    saved_before, squares
):
    run, _ = saved_before([], save_every=6, keep=0)
    start = run.checkpoint(6)
    config = branch(start, steps=20, lr=1e9, out=str(run.path.parent / "branch"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as error:
        poisoned(patch, range(1, 9))
        train(config, console=quiet())
    assert f"checkpoint is {start}. Lower optim.lr (now 1e+09)" in str(error.value)
    assert f"--branch-from {start} --steps N --optim.lr X --out FOLDER" in str(error.value)


def test_a_file_that_may_not_be_so_large_is_named_in_plain_words(squares, tmp_path):
    """A process of its own: a limit of files cannot be raised again."""
    config = settings(squares, tmp_path / "run", steps=2, save_every=1)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=limited_to, args=(100_000, config, theirs))
    process.start()
    said = ours.recv()
    process.join()
    assert said.startswith(f"could not write {tmp_path / 'run/checkpoints/step-00000001'}: a file ")
    assert "at most 100.0 kB here (ulimit -f), the files of a checkpoint have about 1.9 MB" in said
    assert said.endswith("No checkpoint was saved; mend that and continue with --resume")


@pytest.mark.parametrize(
    ("error", "free", "words"),
    [
        (ValueError("3 tensors differ"), 0, "3 tensors differ"),
        (PermissionError(13, "Permission denied", "a"), 0, "[Errno 13] Permission denied: 'a'"),
        (OSError("rank 0: unexpected pos 704"), 9_000, "the disk has 9.0 kB free, a checkpoint ta"),
        (OSError(28, "No space left on device"), 10**12, "No space left on device"),
        (OSError("rank 0: pos 704"), 10**12, "is the disk full or its quota? (rank 0: pos 704)"),
    ],
)
def test_why_a_checkpoint_could_not_be_written(tmp_path, monkeypatch, error, free, words):
    import mor.training.loop as module

    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    path = RunFolder(tmp_path).checkpoint(3)
    assert words in module.why_not_written(error, TrainConfig(), path)


def limited_to(size, config, answer):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        train(config, console=quiet())
    except TrainingError as error:
        answer.send(str(error))


def clock(monkeypatch, step_s, save_s=0.0):
    """Time that only steps and checkpoints take."""
    import mor.training.loop as module

    now, steps, saves = [0.0], module.train_step, module.sharded_state.save

    def step(*arguments):
        now[0] += step_s
        return steps(*arguments)

    def save(*arguments, **others):
        now[0] += save_s
        saves(*arguments, **others)

    monkeypatch.setattr(module, "train_step", step)
    monkeypatch.setattr(module.sharded_state, "save", save)
    fake = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(module, "time", fake)


@pytest.mark.parametrize(
    ("minutes", "save_s", "saved"),
    [
        (5.0, 0.0, [3, 6, 9, 12]),  # steps of 100 s
        (5.0, 30.0, [3, 9, 12]),  # 20 times 30 s is longer than 5 minutes
        (0.0, 0.0, [12]),
    ],
)
def test_the_clock_asks_for_checkpoints_and_for_at_most_a_twentieth_of_the_time(
    squares, tmp_path, monkeypatch, minutes, save_s, saved
):
    clock(monkeypatch, step_s=100.0, save_s=save_s)
    run = RunFolder(tmp_path / "run")
    kept = settings(squares, run.path, save_minutes=minutes, keep=9)
    train(kept, console=quiet())
    assert run.checkpoints() == [run.checkpoint(step) for step in saved]
    assert TrainConfig().save_minutes == 5


def test_checkpoints_by_the_clock_do_not_fill_the_disk_where_all_by_steps_are_kept(
    squares, tmp_path, monkeypatch
):
    clock(monkeypatch, step_s=300.0)  # one is due at every step
    run = RunFolder(tmp_path / "run")
    train(settings(squares, run.path, save_every=5, keep=0, keep_steps=(7,)), console=quiet())
    assert run.checkpoints() == [run.checkpoint(step) for step in (5, 7, 10, 12)]


def killed_at(step, config):
    """A process of its own: the end of a run by SIGKILL."""
    import mor.training.loop as module

    real = module.train_step

    def train_step(config, state, *others):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(config, state, *others)

    module.train_step = train_step
    train(config, console=quiet())


def test_a_run_that_is_killed_goes_on_from_the_last_checkpoint_by_the_clock(squares, tmp_path):
    whole = train(settings(squares, tmp_path / "whole", save_minutes=0), console=quiet())
    run = RunFolder(tmp_path / "run")
    config = settings(squares, run.path, save_minutes=1e-9)
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(9, config))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and run.checkpoints()
    resumed = train(config, resume=True, console=quiet())
    assert resumed.finished
    for a, b in zip(resumed.state.model.parameters(), whole.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            dict(data={"validation_path": "empty.jsonl"}),
            r"empty.jsonl holds no text",
        ),
        (dict(data={"path": "short.jsonl"}), r"training text is too short.*window of 33"),
        (dict(data={"path": "none.jsonl"}), r"none.jsonl"),
        (dict(flops=1e3), r"less than the .* of a single step"),
        (dict(tracker="wandb"), r"tracker='wandb' needs more packages"),
        (dict(branch_from="nowhere"), r"nowhere is neither a checkpoint"),
    ],
)
def test_what_can_be_known_before_step_1_is_found_then_and_leaves_the_folder_free(
    squares, tmp_path, monkeypatch, wrong, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    data = replace(squares, **wrong.pop("data", {}))
    with pytest.raises((ValueError, ImportError), match=message):
        train(settings(data, tmp_path / "run", steps=1, **wrong), console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_first_step_that_fails_leaves_the_folder_free(squares, tmp_path, monkeypatch):
    import mor.training.loop as module

    def too_large(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "train_step", too_large)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(settings(squares, tmp_path / "run", batch_size=16), console=quiet())
    monkeypatch.undo()
    assert train(settings(squares, tmp_path / "run", steps=1), console=quiet()).finished


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_found_at_the_start(
    squares, tmp_path, monkeypatch
):
    import mor.training.loop as module

    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/run cannot be written: Not a directory"):
        train(settings(squares, tmp_path / "file" / "run"), console=quiet())
    config, console = settings(squares, tmp_path / "run", steps=1), quiet()
    model = config.model.replace(vocab_size=300)
    size = 3 * 4 * sum(p.numel() for p in module.Transformer(model).parameters())
    for free in (size - 1, 2 * size):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path, usage=usage: usage)
        if free < size:
            with pytest.raises(
                ValueError, match=r"has 1\.\d MB free, a checkpoint takes about 1\.\d"
            ):
                train(config, console=console)
        else:
            assert train(config, console=console).finished
            assert "up to 3 checkpoints of about 1." in console.file.getvalue()


def test_a_finished_run_says_so_and_how_to_train_it_longer(squares, tmp_path):
    config, console = settings(squares, tmp_path / "run", steps=3), quiet()
    first = train(config, console=quiet())
    (tmp_path / "run" / "latest").unlink()  # as in a run of mor 0.1.0
    before = {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    again = train(config, resume=True, console=console)
    assert again.finished and again.path == first.path
    assert "is finished: it has taken all of its 3 steps. To train it longer, give a larger " in (
        console.file.getvalue()
    )
    assert {p: p.stat().st_mtime_ns for p in first.path.rglob("*")} == before
    assert (tmp_path / "run" / "config.json").is_file()


def test_a_run_is_a_model_folder_for_transformers(squares, tmp_path):
    transformers = pytest.importorskip("transformers")
    importlib.import_module("mor.hub")
    run = RunFolder(tmp_path / "run")
    result = train(settings(squares, run.path, steps=2, save_every=1), console=quiet())
    tokens_BT = torch.tensor([result.corpus.tokenizer.encode("The square of 7 is")])
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path)
    assert tokenizer("The square of 7 is")["input_ids"] == tokens_BT[0].tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(run.path).eval()
    expected = result.state.model.eval()(tokens_BT).logits_BTV
    torch.testing.assert_close(model(tokens_BT).logits, expected)


def test_a_filesystem_without_links_is_said_once_and_loses_nothing(squares, tmp_path, monkeypatch):
    import mor.run_folder as module

    def refuse(path, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "link", refuse)
    console = quiet()
    result = train(settings(squares, tmp_path / "run", save_every=6), console=console)
    assert result.finished and [p.name for p in (tmp_path / "run").glob("latest*")] == []
    assert console.file.getvalue().count("cannot hold links") == 1


def test_what_a_killed_process_left_is_tidied(squares, tmp_path):
    config = settings(squares, tmp_path / "run")
    train(config, console=quiet())
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".step-00000020.77.tmp").mkdir()
    (folder / ".step-00000004.removed.old").mkdir()
    # killed between two renames
    (folder / "step-00000012").rename(folder / ".step-00000012.77.old")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')
    assert train(config, resume=True, console=quiet()).state.step == 12
    assert [p.name for p in folder.iterdir()] == ["step-00000012"]
    assert metrics(tmp_path / "run")[-1]["step"] == 12


def test_a_collapsed_router_is_reported_in_plain_words(squares, tmp_path, monkeypatch):
    console = quiet()
    config = settings(squares, tmp_path / "run", steps=2, eval_every=1)
    import mor.training.loop as module

    real = module.Transformer.init_weights

    def collapsed(model, seed):
        real(model, seed).router.threshold_R.fill_(1.0)
        return model

    monkeypatch.setattr(module.Transformer, "init_weights", collapsed)
    train(config, console=console)
    printed = console.file.getvalue()
    assert printed.count("no validation token takes recursion 2") == 1, "once, not at every step"
    assert "step 2: no validation token" in printed and "raise router.selection_weight" in printed
    assert metrics(tmp_path / "run")[-1]["validation_share_per_recursion"] == [1.0, 0.0]


def test_where_the_peak_is_known_the_share_of_it_is_logged_and_shown(
    squares, tmp_path, monkeypatch
):
    import mor.training.loop as module

    monkeypatch.setattr(module, "peak_flops_per_s", lambda device: 1e12)
    console, out = quiet(), tmp_path / "run"
    train(settings(squares, out, steps=3, log_every=1, eval_every=3), console=console)
    saved, rows = load_config(RunFolder(out).settings), [r for r in metrics(out) if "loss" in r]
    for row in rows:
        elapsed_s = saved.batch_size * saved.seq_len / row["tokens_per_s"]
        done = train_flops(saved.model, saved.seq_len) * saved.batch_size
        assert row["mfu"] == pytest.approx(done / elapsed_s / 1e12)
    shown = f"MFU {100 * rows[-1]['mfu']:.1f}%"
    assert len(rows) == 3 and shown in " ".join(console.file.getvalue().split())
    assert describe(facts(out))["training"]["mfu"] == rows[-1]["mfu"]


def test_two_processes_do_not_train_in_one_directory(squares, tmp_path):
    config = settings(squares, tmp_path / "run", steps=1)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is training in"):
                train(config, console=quiet(), resume=resume)
    train(config, console=quiet())
    FileLock(tmp_path / "run" / ".lock", blocking=False).acquire()


def test_an_existing_run_is_not_overwritten(squares, tmp_path):
    config = settings(squares, tmp_path / "run", steps=1)
    train(config, console=quiet())
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, console=quiet())


def test_a_long_run_ends_with_a_table_of_depths_that_later_weights_do_not_inherit(
    squares, tmp_path, monkeypatch
):
    console = Console(file=io.StringIO(), width=400)
    short = train(settings(squares, tmp_path / "short", steps=2), console=console)
    assert checkpoint.load(short.path).model.depth_table is None
    said = "no table of depths, as the run is short; mor calibrate makes one for --depth\n"
    assert console.file.getvalue().count(said) == 1
    monkeypatch.setattr(importlib.import_module("mor.training.loop"), "LEAST_TOKENS", 0)
    config = settings(squares, tmp_path / "run", steps=2)
    made = train(config, console=quiet())
    table = checkpoint.load(made.path).model.depth_table
    assert table is not None and table.deepest == 2 * config.model.num_recursions
    checkpoint.check_to_continue(made.path)
    longer = replace(config, steps=4, calibrate=False)
    made = train(longer, resume=True, console=quiet())
    assert made.state.model.depth_table is None
    assert checkpoint.load(made.path).model.depth_table is None
