"""The same checkpoint in transformers (needs the extra hf).

python examples/with_transformers.py runs/mor
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import mor.hub  # noqa: F401  makes mor's models known to the Auto classes
from mor.checkpoint import resolve


def main(run: str, prompt: str = "Return the") -> None:
    path = resolve(run)  # the newest checkpoint of the run
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    print(tokenizer.decode(out.sequences[0]))
    print("recursions:", out.past_key_values.depth_BT[0].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
