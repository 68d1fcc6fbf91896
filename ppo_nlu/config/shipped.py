"""The configs that come with the package: `configs/` in a checkout, in the package where it is
installed."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = next(
    (place / "configs" for place in (_PACKAGE, _PACKAGE.parent) if (place / "configs").is_dir()),
    _PACKAGE / "configs",
)


def names() -> list[str]:
    """The names of the configs, such as sst2.yaml and tiny/smoke.yaml; those of folders last."""
    found = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")]
    return sorted(found, key=lambda name: ("/" in name, name))


def find(name: str) -> Path | None:
    """The file of that name, which may begin with configs/; None where there is none."""
    inside = Path(name).as_posix().removeprefix("configs/")
    return FOLDER / inside if inside in names() else None


def purpose(name: str) -> str:
    """What a config is for: the first sentence of the comment at its head."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    head = " ".join(line.lstrip("# ") for line in lines[:4] if line.startswith("#"))
    return re.split(r"(?<=\.)\s", head, maxsplit=1)[0]
