"""Continue a text, and show how many recursions each token took.

python examples/depths.py runs/mor "Return the"
"""

import sys

import mor


def main(run: str, prompt: str = "Return the") -> None:
    config, model, tokenizer = mor.load(run)
    params = mor.SamplingParams(max_new_tokens=20, temperature=0)
    result = mor.generate(model, [tokenizer.encode(prompt)], params)[0]

    pieces = tokenizer.pieces([*result.prompt_ids, *result.token_ids])
    for piece, depth in zip(pieces, result.depths, strict=False):  # the last one was never read
        print(f"{depth} {'■' * depth:<{config.num_recursions}} {piece!r}")
    print(f"mean depth {result.mean_depth:.2f} of {config.num_recursions}")


if __name__ == "__main__":
    main(*sys.argv[1:])
