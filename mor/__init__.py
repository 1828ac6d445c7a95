"""Mixture-of-Recursions language models in PyTorch."""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

__version__ = "0.1.0"


class _AutoClasses(MetaPathFinder):
    """Registers mor's classes when transformers' Auto classes are imported, and costs nothing before."""

    REGISTER = {  # noqa: RUF012
        "transformers.models.auto.configuration_auto": "mor.hf_config",
        "transformers.models.auto.modeling_auto": "mor.hf",
    }

    def __init__(self) -> None:
        self.looking_up = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.REGISTER or self.looking_up:
            return None
        self.looking_up = True
        spec = importlib.util.find_spec(name)
        self.looking_up = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            importlib.import_module(self.REGISTER[name])

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


for _theirs, _ours in _AutoClasses.REGISTER.items():
    if _theirs in sys.modules:
        importlib.import_module(_ours)
sys.meta_path.insert(0, _AutoClasses())
