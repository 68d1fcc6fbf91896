"""Relative paths in a config: they are meant from the folder in which the config is read.

A loaded config holds them as absolute ones, and so does the config.yaml of a run: its run folder
can be used from any folder.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

PATHS = (
    "init_from",
    "model.name_or_path",
    "data.path",
    "data.cache",
    "custom.train",
    "custom.dev",
    "custom.test",
)


def absolute(key: str, value: Any) -> Any:
    """The value of a key; where it is a path, an absolute one. `~` stays, and so does the name of a
    model that is no folder here."""
    if key not in PATHS or not isinstance(value, str) or value.startswith("~"):
        return value
    if key == "model.name_or_path" and (value == "bundled" or not os.path.isdir(value)):
        return value
    with suppress(OSError):  # the current folder has been deleted
        return os.path.abspath(value)
    return value
