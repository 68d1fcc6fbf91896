"""Which form of a LoRA layer runs: rows of kernels/lora_table.json, written from measurements.

A shape that nobody measured takes the safe form. `python benchmarks/kernels.py --write-table` on
a GPU writes the rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("lora_table.json")
VARIANTS = ("fused", "cublas", "extended", "decode")
BACKWARDS = ("fused", "cublas")
DECODE_ROWS, DECODE_RANK = 64, 128  # the most that the decode form takes
_KEY = ("device", "dtype", "k", "o", "rank", "rows")

Key = tuple[str, str, int, int, int, int]


def table_key(device: str, dtype: torch.dtype, k: int, o: int, rank: int, rows: int) -> Key:
    """The key of a shape: x (rows, K), W (O, K); rank and rows in powers of two from 16 up."""
    return device, str(dtype).removeprefix("torch."), k, o, _bucket(rank), _bucket(rows)


def _bucket(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@cache
def load_table(path: Path = TABLE) -> dict[Key, tuple[str, str]]:
    """Key -> (variant, backward); read once."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {_row_key(row): (row["variant"], row["backward"]) for row in rows}


def write_table(rows: Iterable[Mapping[str, Any]], path: Path = TABLE) -> None:
    """Put rows into the file, each in the place of one with the same key; others stay.

    A row has device, dtype, k, o, rank, rows (of `table_key`), variant and backward; more, such as
    the times, is kept as it is.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    table = {_row_key(row): row for row in content["rows"]}
    for row in rows:
        if row["variant"] not in VARIANTS or row["backward"] not in BACKWARDS:
            raise ValueError(f"variant {row['variant']!r} or backward {row['backward']!r} unknown")
        table[_row_key(row)] = dict(row)
    content["rows"] = [table[key] for key in sorted(table)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    load_table.cache_clear()


def _row_key(row: Mapping[str, Any]) -> Key:
    device, dtype, k, o, rank, rows = (row[name] for name in _KEY)
    return str(device), str(dtype), int(k), int(o), int(rank), int(rows)


def decodes(dtype: torch.dtype, rank: int, rows: int) -> bool:
    """Whether a shape is one for `decode`: few rows, and a rank that leaves its registers whole."""
    most = DECODE_RANK if dtype.itemsize == 2 else DECODE_RANK // 2  # above, registers spill
    return rows <= DECODE_ROWS and rank <= most


def choose_variant(
    device: str, dtype: torch.dtype, k: int, o: int, rank: int, rows: int
) -> tuple[str, str]:
    """The forms of the forward and of the backward for x (rows, K), W (O, K)."""
    safe = ("decode" if decodes(dtype, rank, rows) else "cublas", "cublas")
    return load_table().get(table_key(device, dtype, k, o, rank, rows), safe)
