"""Does a converted model compute what transformers computes? Logits and greedy text on real text,
and the way back.

python benchmarks/convert_parity.py SOURCE VALIDATION [--windows 8] [--seq-len 512] [--threads 1]

SOURCE: a Llama directory or a .gguf file. VALIDATION: .jsonl or .jsonl.zst with a field "text".
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from mor import checkpoint
from mor.conversion.convert import convert
from mor.data.corpus import tokenize
from mor.data.sources import read_documents
from mor.generation import SamplingParams, generate

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three uses of a paper clip.",
)


def read_theirs(source):
    which = {"gguf_file": source.name} if source.is_file() else {}
    folder = source.parent if source.is_file() else source
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **which)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **which)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        made, back = Path(folder, "mor"), Path(folder, "llama")
        convert(str(options.source), made, dtype="float32")
        convert(str(made), back, to="llama")
        _, ours, tokenizer = checkpoint.load(made)
        again = AutoModelForCausalLM.from_pretrained(back).eval()
        template = AutoTokenizer.from_pretrained(made)
    theirs, their_tokenizer = read_theirs(options.source)
    weights = again.state_dict()
    texts = read_documents(options.validation)
    data = tokenize(texts, tokenizer)
    scale, there, back_again = [], [], []
    windows = data.spread(options.seq_len, options.windows)
    for i in windows:
        ids = data.batch([i], options.seq_len).tokens_BT
        expected = theirs(ids).logits
        scale.append(expected.abs().max())
        there.append((ours(ids).logits_BTV - expected).abs().max())
        back_again.append((again(ids).logits - expected).abs().max())
    turns = [[{"role": "user", "content": q}] for q in QUESTIONS]
    prompts = [template.apply_chat_template(t, add_generation_prompt=True).input_ids for t in turns]
    prompts += [tokenizer.encode(text.text)[:64] for text in texts[:: len(texts) // 5]]
    same = 0
    for prompt in prompts:
        expected = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=options.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        params = SamplingParams(max_new_tokens=options.new_tokens, temperature=0)
        same += generate(ours, [prompt], params)[0].token_ids == expected
    found = {
        "source": options.source.name,
        "tokens": len(windows) * options.seq_len,
        "largest_logit": torch.stack(scale).max().item(),
        "max_abs_difference": torch.stack(there).max().item(),
        "max_abs_difference_after_the_way_back": torch.stack(back_again).max().item(),
        "weights_bit_equal_after_the_way_back": all(
            torch.equal(w, weights[n]) for n, w in theirs.state_dict().items()
        ),
        "greedy_prompts_equal": f"{same} of {len(prompts)}, {options.new_tokens} tokens each",
        "chat_template_equal": all(
            their_tokenizer.apply_chat_template(t, tokenize=False)
            == template.apply_chat_template(t, tokenize=False)
            for t in turns
        ),
        "documents_with_other_ids_than_transformers": sum(
            their_tokenizer(t.text).input_ids != tokenizer.encode(t.text) for t in texts
        ),
        "documents": len(texts),
    }
    for name, value in found.items():
        print(f"{name.replace('_', ' '):45} {value}")
    machine = {
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(found | {"machine": machine | {"python": platform.python_version()}}))


if __name__ == "__main__":
    main()
