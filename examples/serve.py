"""Serve several prompts together, and print every token as soon as it is known.

python examples/serve.py runs/mor "Return the" "import" "class"
"""

import sys

import mor


def main(run: str, *prompts: str) -> None:
    _, model, tokenizer = mor.load(run)
    engine = mor.Engine(
        model, tokenizer, mor.EngineConfig(max_num_seqs=8, kv_cache_memory=16 * 1024**2)
    )
    params = mor.SamplingParams(max_new_tokens=12, temperature=0.8, seed=1)
    requests = [
        engine.add_request(prompt, params) for prompt in prompts or ("Return the", "import")
    ]

    while engine.has_unfinished:
        for output in engine.step():
            depth = "–" if output.source_depth is None else output.source_depth
            print(f"request {output.request.request_id}: token {output.token_id} at depth {depth}")

    for request in requests:
        print(f"{engine.text(request)!r}: {request.finish_reason}, depth {request.mean_depth:.2f}")
    print(engine.stats()["passes"])


if __name__ == "__main__":
    main(*sys.argv[1:])
