"""How fast `mor data prepare` is, against a bare `encode_batch` loop over texts that are in memory
already.

    python benchmarks/data_prepare.py CORPUS.jsonl.zst --tokenizer DIR --megabytes 40

Both use all cores: the loop through the tokenizer library's own threads, mor through its processes.
Runs alternate; the ratio is that of the medians. Starting Python, reading, writing and fsync count
on mor's side only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import tokenizers

from mor.data.sources import read_documents


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    texts, size = [], 0
    for document in read_documents(options.corpus):
        if size < options.megabytes * 1e6:
            texts.append(document.text)
            size += len(document.text.encode())
    backend = tokenizers.Tokenizer.from_file(str(Path(options.tokenizer) / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.jsonl"
        part.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        rounds = [
            measure(part, Path(folder) / f"out{i}", options.tokenizer, backend, texts)
            for i in range(options.rounds)
        ]
    bare, ours = (
        statistics.median(r[name] for r in rounds) for name in ("bare_tokens_per_s", "tokens_per_s")
    )
    result = {
        "text_megabytes": round(size / 1e6, 1),
        "bare_tokens_per_s": round(bare),
        "tokens_per_s": round(ours),
        "ratio": round(ours / bare, 3),
        "peak_memory_mb": round(max(r["peak_memory_mb"] for r in rounds)),
        "rounds": options.rounds,
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
        },
    }
    print(f"bare encode_batch loop  {bare:12,.0f} tokens/s")
    print(f"mor data prepare        {ours:12,.0f} tokens/s, ratio {ours / bare:.2f}")
    print(f"peak memory of all its processes {result['peak_memory_mb']} MB")
    print(json.dumps(result))


def measure(
    part: Path, out: Path, tokenizer: str, backend: tokenizers.Tokenizer, texts: list[str]
) -> dict[str, float]:
    started, tokens = time.perf_counter(), 0
    for i in range(0, len(texts), 256):
        tokens += sum(
            len(e.ids) for e in backend.encode_batch(texts[i : i + 256], add_special_tokens=False)
        )
    bare_s = time.perf_counter() - started
    started = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "mor",
        "data",
        "prepare",
        str(part),
        "--out",
        str(out),
        "--tokenizer",
        tokenizer,
    ]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
    peak = watch_memory(process)
    printed, _ = process.communicate()
    ours_s = time.perf_counter() - started
    found = json.loads(printed.splitlines()[-1])["splits"]["train"]["tokens"]
    return {
        "bare_tokens_per_s": tokens / bare_s,
        "tokens_per_s": found / ours_s,
        "peak_memory_mb": peak(),
    }


def watch_memory(process: subprocess.Popen):
    """Sample the memory of a process and its children; call the result for the peak in MB."""
    seen = [0.0]

    def look() -> None:
        while process.poll() is None:
            seen.append(tree_memory(process.pid) / 1e6)
            time.sleep(0.05)

    thread = threading.Thread(target=look)
    thread.start()

    def peak() -> float:
        thread.join()
        return max(seen)

    return peak


def tree_memory(pid: int) -> int:
    """Bytes that a process and its descendants do not share with others (PSS), from /proc."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next(
        int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")
    )
    return own + sum(tree_memory(int(child)) for child in children)


if __name__ == "__main__":
    main()
