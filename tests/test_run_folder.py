"""A run's folder: metrics that survive a crash, the checkpoints that are kept, and links to the
newest."""

import os
import shutil

import pytest

from mor import checkpoint
from mor.files import verify, write_checksums
from mor.run_folder import RunFolder


def with_checkpoints(path, *steps):
    run = RunFolder(path)
    for step in steps:
        folder = run.checkpoint(step)
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(step))
        write_checksums(folder)
    return run


def check(folder):
    verify(folder, ["weights"])


def steps(run):
    return [int(path.name.rpartition("-")[2]) for path in run.checkpoints()]


def test_metrics_are_read_whole_and_cut_back_to_a_step(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_metrics() == [] and not run.is_begun
    run.keep_metrics(up_to=0)
    assert not run.is_begun, "there is nothing to continue from"
    for step in (1, 2, 3):
        run.add_metrics({"step": step, "loss": 1 / step})
    with run.metrics.open("a") as log:
        log.write('{"step": 4, "lo')  # cut off by a crash
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]
    run.keep_metrics(up_to=2)
    run.add_metrics({"step": 3})
    assert run.read_metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3}]


def test_a_checkpoint_knows_its_run(tmp_path):
    run = RunFolder(tmp_path)
    assert run.checkpoint(500) == tmp_path / "checkpoints" / "step-00000500"
    assert RunFolder.of(run.checkpoint(500)) == run


@pytest.mark.parametrize(
    ("keep", "spared", "left"),
    [
        (2, (), [30, 40]),
        (1, (10, 99), [10, 40]),
        (2, (40,), [20, 30, 40]),
        (0, (), [10, 20, 30, 40]),
        (9, (), [10, 20, 30, 40]),
    ],
)
def test_the_newest_checkpoints_are_kept_and_those_asked_for(tmp_path, keep, spared, left):
    run = with_checkpoints(tmp_path, 10, 20, 30, 40)
    run.prune(keep, spared)
    assert steps(run) == left
    assert len(list(run.checkpoint(10).parent.iterdir())) == len(left), "nothing hidden is left"


def test_the_newest_intact_checkpoint_is_found_or_offered(tmp_path):
    assert RunFolder(tmp_path / "none").newest_intact(check) is None
    run = with_checkpoints(tmp_path, 10, 20, 30)
    assert run.newest_intact(check) == run.checkpoint(30)
    for step in (30, 20):
        (run.checkpoint(step) / "weights").write_text("damaged")
    with pytest.raises(
        ValueError,
        match=r"step-00000030/weights is damaged.*step-00000010 is intact.*rm -r .*30 .*20\)",
    ):
        run.newest_intact(check)
    (run.checkpoint(10) / "weights").unlink()
    with pytest.raises(ValueError, match=r"30/weights is damaged.*no checkpoint of .* is intact"):
        run.newest_intact(check)


def test_a_killed_process_leaves_nothing_in_view(tmp_path):
    run = with_checkpoints(tmp_path, 10)
    (tmp_path / ".metrics.jsonl.7.tmp").touch()
    run.checkpoint(10).rename(run.checkpoint(10).with_name(".step-00000010.replaced.old"))
    run.checkpoint(20).with_name(".step-00000020.7.tmp").mkdir()
    assert steps(run) == []
    run.tidy()
    assert steps(run) == [10] and [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_metrics_that_are_damaged_name_their_file(tmp_path):
    run = RunFolder(tmp_path)
    for row in ("half", "null", "[" * 100_000):
        run.metrics.write_text(f"{row}\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl: a row is damaged"):
            run.read_metrics()


# Links


def shown(run):
    """What somebody finds who takes the run for a model folder."""
    return (run.path / "weights").read_text()


def test_the_run_shows_the_files_of_its_newest_checkpoint(tmp_path):
    run = with_checkpoints(tmp_path, 10)
    run.link_newest()
    (tmp_path / ".latest.7.tmp").symlink_to("checkpoints/step-00000010")  # killed while linking
    assert shown(run) == "10" and os.readlink(tmp_path / "weights") == "latest/weights"
    with_checkpoints(tmp_path, 20)
    run.link_newest()
    run.prune(1)
    run.tidy()
    assert shown(run) == "20" and steps(run) == [20]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoints", "checksums.json", "latest", "weights"]
    check(tmp_path)
    moved = RunFolder(tmp_path.rename(tmp_path.with_name("moved")))
    assert shown(moved) == "20"


def test_a_copy_that_followed_the_links_shows_its_own_newest_checkpoint(tmp_path):
    run = with_checkpoints(tmp_path / "run", 10)
    run.link_newest()
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "copy", symlinks=False))
    assert not (copy.path / "latest").is_symlink() and shown(copy) == "10"
    with_checkpoints(copy.path, 20)
    copy.link_newest()
    assert shown(copy) == "20" and shown(run) == "10"
    assert RunFolder.below(tmp_path) == [copy, run]


def test_the_newest_checkpoint_is_meant_even_where_the_links_are_older(tmp_path):
    run = with_checkpoints(tmp_path, 10)
    (run.checkpoint(10) / "config.json").write_text("{}")
    run.link_newest()
    with_checkpoints(tmp_path, 20)
    (run.checkpoint(20) / "config.json").write_text("{}")
    assert (tmp_path / "config.json").is_file()
    assert checkpoint.resolve(tmp_path) == run.checkpoint(20)
    assert checkpoint.resolve(tmp_path / "latest") == run.checkpoint(10).resolve()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="neither a checkpoint"):
        checkpoint.resolve(tmp_path)
