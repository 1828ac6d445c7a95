"""What a deepened model is worth on text: loss against its source, token by token, and whether its
router sends the right tokens on.

    python benchmarks/deepen_text.py CHECKPOINT HELD_OUT.jsonl --depths own 1.3 full

Loss at each depth minus that of the source, which is the same model at depth 1, over the same
tokens; intervals take documents as what is independent. A number is a mean depth, for which the
checkpoint must have been calibrated (mor calibrate CHECKPOINT). At the mean depth that the router
spends, random and confident tokens go deeper instead, and those that an oracle knows to gain, all
in real forwards. AUROC: of the router's score after the first recursion for tokens that the second
one really helps.

A gain over the source may come from the text that was trained on, with or without a loop. --control
is a checkpoint with adapters in the one pass (mor convert --deepen --num-recursions 1), trained on
the same text: its loss is a row, and the difference of every row from it is printed, too.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from deepen import area, last_states

from mor import checkpoint
from mor.analysis.early_exit import POLICIES
from mor.cli.depth import parse_depth
from mor.data.sources import read_documents
from mor.model.budget import router_for
from mor.model.other_depths import ForcedRouter
from mor.statistics import group_means


@dataclass(frozen=True, kw_only=True)
class Settings:
    checkpoint: tyro.conf.Positional[Path]
    text: tyro.conf.Positional[Path]
    """.jsonl (also .zst or .gz) of held-out documents."""
    control: Path | None = None
    """Of the same source, trained likewise without a loop."""
    depths: tuple[str, ...] = ("own", "full")
    """own: the router's own rule."""
    tokens: int = 100_000
    seq_len: int = 256
    batch_size: int = 4
    pieces: int = 4
    """Windows of a document at most, so that there are many documents."""
    threads: int = 1


def windows(settings, tokenizer):
    """Rows of seq_len + 1 ids and the document of each; documents spread evenly over the text."""
    length, wanted = settings.seq_len + 1, -(-settings.tokens // settings.seq_len)
    documents = [d.text for d in read_documents(settings.text)]
    documents = [text for text in documents if len(text) > 5 * length]
    every = max(1, len(documents) * settings.pieces // (2 * wanted))
    rows, of = [], []
    for number, text in enumerate(documents[::every]):
        ids = tokenizer.encode(text[: 8 * length * settings.pieces])
        for start in range(0, min(len(ids) - length + 1, settings.pieces * length), length):
            rows.append(ids[start : start + length])
            of.append(number)
        if len(rows) >= wanted:
            break
    return torch.tensor(rows[:wanted]), of[:wanted]


@torch.inference_mode()
def read(model, rows, depths):
    """For each token: loss, confidence at each depth; depth taken, by rule; the router's score."""
    ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    R, total = model.config.num_recursions, ids.numel()
    found = {}
    with last_states(model) as last:
        first = model(ids, targets_BT=targets, max_depth=1, keep_states=True)
    entered = first.routing.states[0].view(*ids.shape, -1)
    found["source"] = first.nll_each
    common = dict(targets_BT=targets, entered_BTD=entered)
    table_R1 = torch.arange(R)[:, None]
    forced = [
        model(ids, router=ForcedRouter(model.router, (table_R1 < d).expand(-1, total)), **common)
        for d in range(2, R + 1)
    ]
    nll_MR = torch.stack([first.nll_each, *(each.nll_each for each in forced)], 1)
    confidence_M = model.predict(last[0]).log_softmax(-1).amax(-1).exp()
    for name, depth in depths.items():
        again = depth == "full"
        output = forced[-1] if again else model(ids, router=router_for(model, depth), **common)
        found[name] = output.nll_each
        found[f"depth of {name}"] = output.routing.depth.double()
        if name == next(iter(depths)):
            score = output.routing.steps[1].decision.logit
    return found, nll_MR, confidence_M, score, (ids, common)


@torch.inference_mode()
def read_control(model, rows):
    """Its loss of each token, and their depth."""
    output = model(rows[:, :-1].contiguous(), targets_BT=rows[:, 1:].contiguous())
    return output.nll_each, output.routing.depth.double()


@torch.inference_mode()
def chosen_by(model, policy, nll_MR, confidence_M, mean, batch):
    """Losses where a policy says who goes deeper, and how deep all go."""
    ids, common = batch
    R = nll_MR.shape[1]
    confidence_MR = confidence_M[:, None].expand(-1, R)
    depth_M = policy(nll_MR.double(), confidence_MR.double(), mean)
    router = ForcedRouter(model.router, torch.arange(R)[:, None] < depth_M)
    return model(ids, router=router, **common).nll_each, depth_M.double()


def difference(values, documents):
    (group,) = group_means(values.tolist(), ["all"] * len(values), documents)
    return {"nats": group.mean, "low": group.low, "high": group.high}


def main():
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    loaded = checkpoint.load(settings.checkpoint)
    model, R = loaded.model.requires_grad_(False), loaded.config.num_recursions
    depths = {d: None if d == "own" else parse_depth(d, R) for d in settings.depths}
    control = None
    if settings.control is not None:
        control = checkpoint.load(settings.control).model.requires_grad_(False)
    rows, of = windows(settings, loaded.tokenizer)
    if len(set(of)) < 2:
        raise SystemExit("an interval needs several documents; raise --tokens or lower --pieces")
    parts, documents = [], []
    for start in range(0, len(rows), settings.batch_size):
        some = slice(start, start + settings.batch_size)
        found, nll_MR, confidence_M, score, batch = read(model, rows[some], depths)
        mean = float(found[f"depth of {settings.depths[0]}"].mean())
        for name, policy in POLICIES.items() if mean > 1 else ():
            chosen = chosen_by(model, policy, nll_MR, confidence_M, mean, batch)
            found[name], found[f"depth of {name}"] = chosen
        if control is not None:
            found["control"], found["depth of control"] = read_control(control, rows[some])
        found |= {"gain": nll_MR[:, 0] - nll_MR[:, 1], "score": score}
        parts.append(found)
        documents += [d for d in of[some] for _ in range(settings.seq_len)]
    names = [name for name in parts[0] if all(name in part for part in parts)]
    whole = {name: torch.cat([part[name] for part in parts]).double() for name in names}
    source = whole.pop("source")
    result = {
        "checkpoint": str(settings.checkpoint),
        "tokens": len(source),
        "documents": len(set(documents)),
        "source_nll": float(source.mean()),
        "auroc_of_gain": area(whole["score"], whole["gain"] > 0),
        "share_that_gains": float((whole["gain"] > 0).double().mean()),
        "rows": {
            name: difference(whole[name] - source, documents)
            | {"mean_depth": float(whole[f"depth of {name}"].mean())}
            for name in (*settings.depths, *POLICIES, "control")
            if name in whole
        },
        "minus_control": {
            name: difference(whole[name] - whole["control"], documents)
            for name in (*settings.depths, *POLICIES)
            if name in whole and "control" in whole
        },
        "machine": dict(torch=torch.__version__, python=platform.python_version()),
    }
    print(f"source {result['source_nll']:.4f} nats over {result['tokens']:,} tokens")
    for name, row in result["rows"].items():
        print(
            f"{name:10} {row['nats']:+.5f} [{row['low']:+.5f} {row['high']:+.5f}] nats, mean depth "
            f"{row['mean_depth']:.3f}"
        )
    for name, row in result["minus_control"].items():
        print(f"{name} - control: {row['nats']:+.5f} [{row['low']:+.5f} {row['high']:+.5f}] nats")
    print(f"AUROC of the router's score for tokens that gain: {result['auroc_of_gain']:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
