"""Write the documentation of this Python as JSON lines: two megabytes of text to try things on.

python examples/python_docs.py corpus.jsonl
"""

import json
import sys
from pathlib import Path

from mor.data.python_docs import python_documents


def main(out: Path) -> None:
    documents = python_documents()
    lines = (json.dumps({"title": d.name, "text": d.text}) for d in documents)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out}: {len(documents)} documents, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
