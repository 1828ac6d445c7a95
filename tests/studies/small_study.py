"""Small studies to run."""

from rich.console import Console

from mor.studies.study import load_study

BASE = """
title = "Test"
seeds = [0, 1]
reference = "recursive"
depth_pays = { deep = "recursive", shallow = "one pass" }
windows = 8

[base]
steps = 4
seq_len = 8
batch_size = 2
eval_every = 2
eval_windows = 4
log_every = 1
device = "cpu"
data.path = "task:state-tracking?hops=3"
model.preset = "tiny"
model.dim = 16
model.num_heads = 2
model.num_kv_heads = 2
model.head_dim = 8
model.ffn_dim = 24
model.max_seq_len = 32

[variants.recursive]
model = { num_layers = 4, num_recursions = 2 }
[variants."one pass"]
model = { num_layers = 3 }
"""


QUIET = Console(quiet=True)


def study_file(tmp_path, more="", base=BASE):
    path = tmp_path / "study.toml"
    path.write_text(base + more)
    return path


def study(tmp_path, more="", base=BASE):
    return load_study(study_file(tmp_path, more, base))


STUDY = """
title = "Test"
seeds = [0, 1]
reference = "recursive"
budgets = [6e7, 1.2e8]
exits = ["MoR"]
windows = 16
tuning = { rates = [1e-6, 1e-2], share = 0.5 }
axes.width = { narrow = { model.dim = 16 } }
depth_pays = { deep = "recursive", shallow = "recursive" }

[base]
steps = 1
seq_len = 16
batch_size = 4
log_every = 1
device = "cpu"
data.path = "task:state-tracking?hops=3"
optim = { warmup = 0.2 }

[base.model]
preset = "tiny"
num_layers = 5
num_recursions = 3
num_heads = 2
num_kv_heads = 2
head_dim = 8
ffn_dim = 24
max_seq_len = 16

[variants.recursive]
[variants.MoR.model.router]
kind = "expert_choice"
alpha = 1.0
gate = "residual"
"""


def of(rows, *stages):
    return [row for row in rows if row["stage"] in stages]
