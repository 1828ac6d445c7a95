"""Export a checkpoint with the code that runs it, for machines that have transformers but not mor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from mor import checkpoint

_IMPORT = re.compile(r"^(\s*)from mor\.(\w+) import", re.MULTILINE)
_REGISTER = re.compile(r"^Auto\w+\.register\(.*\)\n", re.MULTILINE)  # auto_map does that for remote code
_AUTO_MAP = {"AutoConfig": "mor_hf_config.MoRConfig", "AutoModelForCausalLM": "mor_hf.MoRForCausalLM"}


def export(source: str | Path, out: str | Path) -> Path:
    """Copy a checkpoint (or a run's newest) to ``out`` so that it loads with ``trust_remote_code=True``.

    The directory holds this package's own modules, their imports made relative. mor reads it as well.
    Raises ValueError if ``out`` exists or ``source`` is no checkpoint.
    """
    source, out = checkpoint.resolve(source), Path(out)
    checkpoint.read_config(source)
    if out.exists():
        raise ValueError(f"{out} exists; choose another directory or delete it")
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("training_state", "checksums.json"))
    for module in modules():
        code = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        code = _REGISTER.sub("", _IMPORT.sub(r"\1from .mor_\2 import", code))
        (out / f"mor_{module}.py").write_text(code, encoding="utf-8")
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": _AUTO_MAP}, indent=2))
    return out


def modules(start: str = "hf") -> list[str]:
    """Modules of this package that ``start`` needs, itself included."""
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        code = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        waiting += [imported for _, imported in _IMPORT.findall(code)]
    return sorted(found)
