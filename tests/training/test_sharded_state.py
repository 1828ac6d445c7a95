"""The state of the optimizer on a full disk, and in a folder that somebody else has made."""

import os
import pickle
import resource
import shutil

import pytest
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from mor import checkpoint
from mor.training import sharded_state
from mor.training.loop import TrainingError, train
from mor.training.optim import OptimConfig, build_optimizers
from tests.training.small_run import quiet, settings


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(squares, tmp_path, monkeypatch):
    """A limit on the size of files refuses writes as a full disk does: real errors of every
    library."""
    config = settings(squares, tmp_path / "run", save_every=4)
    folder, real = tmp_path / "run" / "checkpoints", sharded_state.save
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for largest in (2_000, 100_000):  # the optimizer's file is refused, or only the weights

        def full(path, *arguments, limit=largest, **others):
            if path.name == "step-00000008":
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            return real(path, *arguments, **others)

        monkeypatch.setattr(sharded_state, "save", full)
        try:
            with pytest.raises(
                TrainingError,
                match=r"could not write .*step-00000008.*last good checkpoint is .*step-00000004",
            ):
                train(config, resume=folder.exists(), console=quiet())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [p.name for p in folder.iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert train(config, resume=True, console=quiet()).finished


class Hostile:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    config = settings(squares, tmp_path_factory.mktemp("trained") / "run", steps=1)
    return train(config, console=quiet()).path


@pytest.mark.parametrize("where", ["metadata", "a number"])
def test_no_code_of_a_checkpoint_runs_when_training_goes_on(trained, tmp_path, where):
    shutil.copytree(trained, tmp_path / "step")
    state, mark = tmp_path / "step" / checkpoint.OPTIMIZER, tmp_path / "mark"
    model = checkpoint.load(trained).model
    optimizers = build_optimizers(model, OptimConfig())
    sharded_state.load_optimizers(tmp_path / "step", model, optimizers)  # as it is it can be read
    if where == "metadata":
        metadata = pickle.loads((state / ".metadata").read_bytes())
        metadata.planner_data = Hostile(mark)
        (state / ".metadata").write_bytes(pickle.dumps(metadata))
    else:
        shares = {"optimizer": get_optimizer_state_dict(model, optimizers)}
        shares["optimizer"]["param_groups"][0]["lr"] = Hostile(mark)
        shutil.rmtree(state)
        state_dict_saver.save(shares, checkpoint_id=state, no_dist=True)
    with pytest.raises(ValueError, match=rf"{state}: a file in it holds more than an optimizer's"):
        sharded_state.load_optimizers(tmp_path / "step", model, optimizers)
    assert not mark.exists()
