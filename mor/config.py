"""Moved to :mod:`mor.model.config`; this name goes with the next version."""

import warnings

from mor.model.config import *  # noqa: F403

warnings.warn("mor.config is now mor.model.config", DeprecationWarning, stacklevel=2)
