"""How a model that the engine cannot run is refused: in one line that names its architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ppo_nlu.errors import UserError, first_line


def unsupported(model: Any, reason: str) -> UserError:
    """The one line about an architecture that the engine does not run correctly."""
    return UserError(
        f"model.name_or_path: {model.config.model_type} {reason}; "
        "this architecture is not supported"
    )


def reason_of(error: Exception) -> str:
    """What a library says, in a few words."""
    line = first_line(error, 160)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@contextmanager
def refused(model: Any, what: str) -> Iterator[None]:
    """Inside, whatever a library raises becomes one line, except a lack of memory, which is not the
    model's fault."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError, UserError):
        raise
    except Exception as error:
        raise unsupported(model, f"{what} ({reason_of(error)})") from error
