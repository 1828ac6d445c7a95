"""Export a checkpoint with the code that runs it, for machines that have transformers but not
mor. They need pydantic as well, which transformers names if it is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mor
from mor import checkpoint
from mor.files import read_json, replacing

_IMPORT = re.compile(r"^(\s*)from mor\.(?:\w+\.)?(\w+) import", re.MULTILINE)
_AUTO_MAP = {
    "AutoConfig": "mor_configuration.MoRConfig",
    "AutoModelForCausalLM": "mor_modeling.MoRForCausalLM",
}


def export(source: str | Path, out: str | Path) -> Path:
    """Copy a checkpoint (or a run's newest) to ``out`` so that it loads with
    ``trust_remote_code=True``.

    The directory holds this package's own modules, their imports made relative. mor reads it as
    well. Raises ValueError if ``out`` exists or ``source`` is not a checkpoint that loads.
    """
    source, out = checkpoint.resolve(source), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another directory or delete it")
    checkpoint.load(source)  # nobody else will look at its checksums
    left_out = shutil.ignore_patterns("training_state", "checksums.json")
    with replacing(out) as made:
        _copy(source, made, left_out)
        for module in modules():
            code = _IMPORT.sub(r"\1from .mor_\2 import", module.read_text(encoding="utf-8"))
            (made / f"mor_{module.name}").write_text(code, encoding="utf-8")
        file = made / "config.json"
        file.write_text(json.dumps(read_json(file) | {"auto_map": _AUTO_MAP}, indent=2))
    return out


def _copy(source: Path, out: Path, left_out: Any) -> None:
    """A folder. Raises OSError with the first thing that went wrong; shutil gathers them all."""
    try:
        shutil.copytree(source, out, ignore=left_out)
    except shutil.Error as error:
        raise OSError(f"could not write {out}: {error.args[0][0][2]}") from None


def modules() -> list[Path]:
    """The files that an export ships: the model, what makes it a transformers model, and the ground
    they stand on."""
    package = Path(mor.__file__).parent
    model = sorted(file for file in (package / "model").glob("*.py") if file.name != "__init__.py")
    return [
        *model,
        package / "hub" / "configuration.py",
        package / "hub" / "modeling.py",
        package / "settings.py",
    ]
