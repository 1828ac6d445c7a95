"""NLL and bits per byte, before any training, of recursive and MoR models that start from a
pretrained one.

python benchmarks/init_nll.py SOURCE VALIDATION [--windows 64] [--seq-len 512] [--threads 2]

SOURCE: anything that `mor convert` reads. VALIDATION: .jsonl or .jsonl.zst with a field "text".
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from mor.conversion.convert import read_source
from mor.conversion.initialise import fitting_depth, recursive_init
from mor.conversion.layers import count_parameters
from mor.data.corpus import tokenize
from mor.data.sources import read_documents
from mor.evaluation.nll import evaluate
from mor.model.config import RouterConfig, layout

INITS = ("stepwise", "average", "lower", "upper", "random")
ROUTERS = {
    "recursive": RouterConfig(),
    "MoR, paper gate": RouterConfig(kind="expert_choice"),
    "MoR, residual gate": RouterConfig(kind="expert_choice", gate="residual"),
    "MoR, residual gate, alpha 1": RouterConfig(kind="expert_choice", gate="residual", alpha=1.0),
}
KINDS = [("recursive", 2), *((name, 3) for name in ROUTERS)]


def measure(model, data, settings, **labels):
    found = evaluate(model, data, batch_size=4, **settings)
    row = labels | {
        "layers": model.config.num_layers,
        "params": count_parameters(model),
        "nll": found.nll,
        "bits_per_byte": found.bits_per_byte,
        "mean_depth": found.mean_depth,
    }
    name = f"{row['kind']}-{row['recursions']}"
    print(
        f"{name:30} {row['init']:9} {row['layers']:6} {row['params'] / 1e6:6.1f}M "
        f"{row['nll']:8.4f} {row['bits_per_byte']:10.4f} {row['mean_depth']:10.2f}",
        flush=True,
    )
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("validation", type=Path)
    parser.add_argument("--windows", type=int, default=64, help="spread evenly over the text")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    source = read_source(options.source)
    model = source.model.float()
    data = tokenize(read_documents(options.validation), source.tokenizer)
    settings = {"seq_len": options.seq_len, "max_windows": options.windows}
    print(
        f"{options.windows} windows of {options.seq_len} tokens of {options.validation.name}; "
        "causal selection"
    )
    print(f"{'model':30} {'init':9} layers  params      NLL  bits/byte mean depth")
    rows = [measure(model, data, settings, kind="source", recursions=1, init="")]
    for kind, recursions in KINDS:
        depth = fitting_depth(model.config.num_layers, recursions, "middle_cycle")
        config = model.config.replace(router=ROUTERS[kind], **layout(depth, recursions))
        for init in INITS:
            made = recursive_init(model, config, init)
            rows.append(measure(made, data, settings, kind=kind, recursions=recursions, init=init))
    machine = {
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = {"file": options.validation.name, "windows": options.windows, "seq_len": options.seq_len}
    print(
        json.dumps(
            {"rows": rows, "text": text, "source": Path(options.source).name, "machine": machine}
        )
    )


if __name__ == "__main__":
    main()
