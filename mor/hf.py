"""Moved to :mod:`mor.hub`; this name goes with the next version."""

import warnings

from mor.hub import *  # noqa: F403

warnings.warn("mor.hf is now mor.hub", DeprecationWarning, stacklevel=2)
