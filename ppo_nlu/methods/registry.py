"""The methods by name: for each name of `config.METHODS`, `METHOD` of the file of that name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from ppo_nlu import config
from ppo_nlu.config import Config
from ppo_nlu.methods.base import Method
from ppo_nlu.tasks import TaskSpec

Maker = Callable[[Config, Mapping[str, TaskSpec]], Method]

METHODS: dict[str, Maker] = {
    name: import_module(f"ppo_nlu.methods.{name}").METHOD for name in config.METHODS
}
