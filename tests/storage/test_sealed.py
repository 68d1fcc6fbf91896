"""Sealed JSON: values come back bit for bit, and no changed byte goes unseen."""

from __future__ import annotations

import json
import math

import pytest

from ppo_nlu.storage import sealed


def test_sealed_values_come_back_bit_for_bit() -> None:
    value = {"a": [0.1, 1 / 3, 5e-324, -0.0, 1e308], "b": {"c": None, "d": "ü\n"}, "e": (1, 2)}
    back = sealed.unseal(sealed.seal(value))
    assert back == value | {"e": [1, 2]} and math.copysign(1, back["a"][3]) == -1
    assert sealed.unseal(sealed.seal({})) == {}
    odd = sealed.unseal(sealed.seal({"x": [math.nan, math.inf, {"y": -math.inf}], "float": "nan"}))
    assert math.isnan(odd["x"][0]) and odd["x"][1:] == [math.inf, {"y": -math.inf}]
    assert odd["float"] == "nan"
    json.loads(sealed.seal({"x": math.nan}), parse_constant=pytest.fail)  # strict JSON


def test_no_changed_byte_is_unsealed() -> None:
    text = sealed.seal({"step": 7, "nested": {"loss": 0.25, "names": ["a", "b"]}}).encode()
    for place in range(len(text)):
        for bit in range(8):
            spoilt = bytearray(text)
            spoilt[place] ^= 1 << bit
            with pytest.raises(ValueError):
                sealed.unseal(spoilt.decode())
    for end in range(len(text)):
        with pytest.raises(ValueError):
            sealed.unseal(text[:end].decode())
    for other in ("[]", "1", "null", "{}", '{"sha256": 1}', "[" * 100_000, "{" + text.decode()):
        with pytest.raises(ValueError):
            sealed.unseal(other)
