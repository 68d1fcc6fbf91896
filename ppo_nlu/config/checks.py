"""Checks of one value of a config: the type of its field, and the limits of the field.

A text has at most `LONGEST` characters, a list at most `MOST` items.
"""

from __future__ import annotations

import math
import re
import types
import unicodedata
from collections.abc import Mapping
from difflib import get_close_matches
from reprlib import repr as short
from typing import Any, Union, get_args, get_origin

from ppo_nlu.config.fields import Leaf
from ppo_nlu.config.mistakes import COMMAND_LINE, mistake

LONGEST, MOST = 4096, 10_000

TEXT = "\t\n\r\x85"  # the control characters of ordinary text
# 1e-5 has no dot, so YAML 1.1 calls it text; where a number is wanted it is one.
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


def checked(leaf: Leaf, value: Any, where: str, key: str) -> Any:
    """The value in the type of its field; UserError where it has another, or is out of limits."""
    try:
        value = _convert(leaf.kind, value)
    except TypeError:
        hint = _type_hint(leaf.kind, value, where, key)
        raise mistake(
            where, key, f"expected {_describe(leaf.kind)}, got {_name(value)}{hint}"
        ) from None
    problem = _out_of_limits(leaf.limits, value)
    if problem:
        raise mistake(where, key, f"{_name(value)} {problem}")
    return value


def _convert(kind: Any, value: Any) -> Any:
    """The value as that type, or TypeError; the only changes are to float, and in a mapping from
    a value to a list of texts (`Yes: 1` is `Yes: ["1"]`)."""
    if get_origin(kind) in (Union, types.UnionType):
        for arm in get_args(kind):
            try:
                return _convert(arm, value)
            except TypeError:
                continue
    elif get_origin(kind) is list and isinstance(value, list):
        return [_convert(get_args(kind)[0], item) for item in value]
    elif get_origin(kind) is dict and isinstance(value, dict):
        return {key: [_text(item) for item in _listed(items)] for key, items in value.items()}
    elif kind is float and not isinstance(value, bool):
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)
        if isinstance(value, int) and abs(value) < 1e300:
            value = float(value)
        if isinstance(value, float) and math.isfinite(value):
            return value
    elif (kind is str and isinstance(value, str) and value.strip() and value != "None") or (
        kind in (bool, int, type(None)) and type(value) is kind
    ):
        return value
    raise TypeError


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    """A scalar as the data files write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise TypeError


def _describe(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_describe(get_args(kind)[0]).removeprefix('a ')}s"
    if get_origin(kind) is dict:
        return "a mapping of words to values"
    return {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }[kind]


def _type_hint(kind: Any, value: Any, where: str, key: str) -> str:
    """How to mend a value of a wrong type, for the common cases; "" for others."""
    kinds = get_args(kind) or (kind,)
    number_like = _EXPONENT.fullmatch(value) if isinstance(value, str) else type(value) is not bool
    if value == "None" and type(None) in kinds:
        return "; write null"
    if str in kinds and isinstance(value, bool | int | float):
        quoted = f"'{key}=\"{_name(value)}\"'" if where == COMMAND_LINE else f"'{_name(value)}'"
        return f"; quote it: {quoted}"
    if float in kinds and isinstance(value, str | int | float) and number_like:
        return "; it must be finite"
    if bool in kinds and str(value).lower() in ("yes", "no", "on", "off"):
        return f"; write {'true' if str(value).lower() in ('yes', 'on') else 'false'}"
    return ""


def _name(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else short(value)


def _out_of_limits(limits: Mapping[str, Any], value: Any) -> str:
    """Which limit of its field a value breaks, and the mend; "" where it breaks none."""
    if value is None or isinstance(value, bool):
        return ""
    if problem := _too_long(value, limits.get("longest", LONGEST)):
        return problem
    if isinstance(value, list | dict):
        return ""
    if "choices" in limits and value not in limits["choices"]:
        near = get_close_matches(str(value), [str(c) for c in limits["choices"]], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"is not a choice; {hint}use {' or '.join(map(str, limits['choices']))}"
    low, high = limits.get("min"), limits.get("max")
    over = limits.get("exclusive_min", False)
    under = limits.get("exclusive_max", False)
    too_low = low is not None and (value <= low if over else value < low)
    too_high = high is not None and (value >= high if under else value > high)
    if not (too_low or too_high):
        return ""
    bounds = []
    if low is not None:
        bounds.append(f"more than {low}" if over else f"at least {low}")
    if high is not None:
        bounds.append(f"less than {high}" if under else f"at most {high}")
    return f"is out of range; it must be {' and '.join(bounds)}"


def _too_long(value: Any, longest: int) -> str:
    """What is wrong with the texts of a value: their length, or a character in them."""
    if isinstance(value, list | dict):
        if len(value) > MOST:
            return f"has {len(value):,} items; at most {MOST:,} are allowed"
        inside = value if isinstance(value, list) else [*value, *value.values()]
        return next(filter(None, (_too_long(item, longest) for item in inside)), "")
    if not isinstance(value, str):
        return ""
    if len(value) > longest:
        return f"has {len(value):,} characters; at most {longest:,} are allowed"
    # Cc: control characters; Cs: half of a character, which no file can hold.
    odd = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in TEXT), "")
    return f"holds the control character U+{ord(odd):04X}; leave it out" if odd else ""
