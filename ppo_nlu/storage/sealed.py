"""JSON as this package writes it: strict, and sealed by its own sha256 so that damage shows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import read_bytes


class Damaged(UserError):
    """A file of this package whose content is not what was written."""


def to_json(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """Strict JSON, in which what is not a finite number is null."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def plain(value: Any) -> Any:
    """The same value in JSON types: one-element tensors as numbers, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def seal(value: Mapping[str, Any]) -> str:
    """JSON with its own sha256; floats come back bit for bit, NaN included, tuples as lists."""
    try:
        body = json.dumps(value, allow_nan=False)
    except ValueError:  # a number that JSON cannot write
        body = json.dumps(_with_words(value), allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-1]}{", " * (body != "{}")}"sha256": "{digest}"}}\n'


def unseal(text: str) -> dict[str, Any]:
    """What `seal` was given; ValueError where a single byte has changed."""
    found = parse_object(text)
    if "sha256" not in found:
        raise ValueError("it has no sha256")
    stated = found.pop("sha256")
    body = text[: text.rindex('"sha256"')].removesuffix(", ") + "}"
    if f'"sha256": "{stated}"}}\n' != text[text.rindex('"sha256"') :]:
        raise ValueError("its sha256 is not its last entry")
    if hashlib.sha256(body.encode()).hexdigest() != stated:
        raise ValueError("its sha256 is another")
    return json.loads(body, object_hook=_from_word) if '{"float": "' in body else found


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where it has none, OSError where it cannot be read."""
    return parse_object(read_bytes(path).decode())


def parse_object(text: str) -> dict[str, Any]:
    """The object in a JSON text; ValueError for anything else."""
    found = _decoded(text)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _decoded(text: str) -> Any:
    """The value of a JSON text; ValueError for anything else."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _with_words(value: Any) -> Any:
    """The same with {"float": "nan"} and the like for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _with_words(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_words(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _from_word(value: dict[str, Any]) -> Any:
    if value.keys() == {"float"} and value["float"] in ("nan", "inf", "-inf"):
        return float(value["float"])
    return value
