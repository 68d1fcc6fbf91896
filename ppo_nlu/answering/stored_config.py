"""The config that a program is given. One that lies in a run folder names no code to run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppo_nlu.config import Config, load_config, parse_overrides
from ppo_nlu.errors import UserError
from ppo_nlu.runtime import run_folder
from ppo_nlu.tasks import REWARD_KINDS


def read_config(path: str | Path, overrides: Sequence[str] = (), training: bool = False) -> Config:
    """The config in a file that the user names; one in a run folder is read by `stored_config`."""
    for place in _through_links(Path(path)):
        if place.name == "config.yaml" and run_folder.is_run_dir(place.parent):
            return stored_config(place.parent, overrides, training)
    return load_config(path, overrides)


def _through_links(path: Path) -> Iterator[Path]:
    """The path, and where it is a link, each path that it leads to."""
    yield path
    for _ in range(40):  # as many as Linux follows
        if not os.path.islink(path):
            return
        path = path.parent / os.readlink(path)
        yield path


def stored_config(
    run_dir: str | Path, overrides: Sequence[str] = (), training: bool = False
) -> Config:
    """The config of a run folder, which may come from anybody: it alone runs no code.

    Code that it names must be named again on the command line.
    """
    path = Path(run_dir) / "config.yaml"
    cfg, said = load_config(path, overrides), parse_overrides(overrides, Config)
    for text in _code(cfg, training):
        key, _, value = text.partition("=")
        if key not in said:
            raise UserError(
                f"{path}: {key}: {value} would run Python code, which a run folder alone may not "
                f"ask for; if you trust it, add {shlex.quote(text)}"
            )
    return cfg


def _code(cfg: Config, training: bool) -> Iterator[str]:
    """`key=value` of what a config names that is Python code."""
    if cfg.model.trust_remote_code:
        yield "model.trust_remote_code=true"
    if training and cfg.custom.reward not in ("auto", *REWARD_KINDS):
        yield f"custom.reward={cfg.custom.reward}"


def resume_command(run_dir: str | Path, cfg: Config | None = None) -> str:
    """What to type to go on with a run."""
    folder = Path(run_dir)
    words = [str(folder / "config.yaml"), *(_code(cfg, True) if cfg else ()), "--resume"]
    return f"python -m ppo_nlu.train {shlex.join([*words, str(folder)])}"
