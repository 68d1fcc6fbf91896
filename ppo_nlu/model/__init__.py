"""The language model: loading, LoRA, heads, checks and decoding."""

from pathlib import Path

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "tiny"  # a small model, installed along
