"""Small documents in files."""

import json

TEXTS = [f"Document {i}: the square of {i} is {i * i}. é☃ " * (1 + i % 7) for i in range(150)]


def write_jsonl(path, texts=TEXTS, **extra):
    path.write_text(
        "".join(json.dumps({"text": t} | extra) + "\n" for t in texts), encoding="utf-8"
    )
    return str(path)
