"""Moved to :mod:`mor.generation`; this name goes with the next version, and ``mor.generate`` is the
function alone.

Until then it is both: importing this module puts it in the function's place, so it can be called
like it.
"""

import sys
import warnings
from types import ModuleType
from typing import Any

from mor import generation
from mor.generation import *  # noqa: F403

warnings.warn("the module mor.generate is now mor.generation", DeprecationWarning, stacklevel=2)


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        return generation.generate(*args, **settings)


sys.modules[__name__].__class__ = _CallableModule
