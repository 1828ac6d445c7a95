"""A process that finds out whether structures can be compiled, and is gone if that takes too long.

Reads lines of JSON: first the tokenizer, and says when it is ready; then structures. Answers each
with a line, the reason why it cannot be followed or null.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from mor.structure import Grammars, Structure


def main() -> None:
    given = json.loads(sys.stdin.readline())
    made = Grammars(given["tokenizer"], given["end_ids"])
    print("ready", flush=True)
    for line in sys.stdin:
        # Compiling cannot be interrupted, and nobody handles this signal: it ends the process.
        signal.setitimer(signal.ITIMER_REAL, given["limit_s"])
        answer = _reason(made, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


def _reason(grammars: Grammars, structure: dict[str, Any]) -> str | None:
    try:
        grammars.matcher(Structure(**structure))
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
