"""Train a small MoR on a task of known depth, from Python.

python examples/train.py runs/example [STEPS]
"""

import sys

import mor
from mor.data.config import DataConfig
from mor.training.config import TrainConfig
from mor.training.loop import train
from mor.training.optim import OptimConfig


def main(out: str, steps: int = 300) -> None:
    router = mor.RouterConfig(kind="expert_choice", gate="residual", alpha=1.0)
    model = mor.preset(
        "tiny", num_recursions=4, num_layers=6, kv_strategy="hybrid", router=router, init_std=0.125
    )
    config = TrainConfig(
        out=out,
        model=model,
        data=DataConfig(path="task:state-tracking?hops=8"),
        optim=OptimConfig(lr=4e-3),
        steps=steps,
        seq_len=32,
        batch_size=16,
    )
    result = train(config)
    print(f"{result.path}: {result.state.tokens:,} tokens, {result.state.flops:.2e} FLOPs")

    trained = mor.load(out).model
    found = mor.evaluate(trained, result.corpus.validation, seq_len=32, max_windows=64)
    print(f"{found.nll:.3f} nats per answer at a mean depth of {found.mean_depth:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
