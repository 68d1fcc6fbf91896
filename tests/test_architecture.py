"""The rooms of the package and the arrows between them, read from the imports.

A room may import itself and the rooms named beside it; every module belongs to a room.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ppo_nlu"

# A room is a folder of the package, or the files of its top that are named here; each line may
# import what stands above it, and no more than it says.
ROOMS = {
    "ground": "__init__ errors",
    "maths": "losses advantages",
    "kernels": "kernels",
    "storage": "storage",
    "config": "config",
    "tasks": "tasks",
    "data": "data",
    "ops": "ops",
    "tree": "tree",
    "runtime": "runtime",
    "model": "model",
    "methods": "methods",
    "answering": "answering",
    "training": "training",
    "examples": "examples",
    "doors": "__main__ train evaluate predict export submit report teach_form pretrain reproduce",
}
ALLOWED = {
    "ground": "",
    "maths": "",
    "kernels": "",
    "storage": "ground",
    "config": "ground storage",
    "tasks": "ground storage config",
    "data": "ground storage config tasks",
    "ops": "ground maths kernels",
    "tree": "ground ops",
    "runtime": "ground storage config",
    "model": "ground maths storage config tasks ops tree runtime",
    "methods": "ground maths storage config tasks data ops tree runtime model",
    "answering": "ground storage config tasks data runtime tree model methods",
    "training": "ground storage config tasks data runtime model methods answering",
    "examples": "maths ops",
    "doors": "ground maths storage config tasks data tree runtime model methods answering training",
}
# None: no limit. Everything else must come from the standard library.
LIBRARIES = {"maths": {"torch"}, "kernels": {"torch", "triton"}}
FORBIDDEN = {key: {"torch", "triton", "transformers"} for key in ("tasks", "data")}


def modules() -> dict[str, Path]:
    """Dotted name -> file, for the package and the kernels beside it."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        found[f"{PACKAGE}.kernels.{path.stem}"] = path
    return found


def room_of(module: str) -> str | None:
    if module.endswith(".__main__"):
        return "doors"
    first = module.split(".")[1] if "." in module else "__init__"
    return next((room for room, names in ROOMS.items() if first in names.split()), None)


def imports(name: str, source: str, is_package: bool, known: set[str]) -> set[str]:
    """Full dotted names of all that is imported, at any depth of the file."""
    result = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join(parents + ([base] if base else []))
            inner = {f"{base}.{alias.name}" for alias in node.names}
            result |= inner & known
            if not inner <= known:
                result.add(base)
    return result


def graph() -> dict[str, set[str]]:
    found = modules()
    return {
        name: imports(name, path.read_text("utf-8"), path.stem == "__init__", set(found))
        for name, path in found.items()
    }


def wrong_arrows(arrows: dict[str, set[str]]) -> list[str]:
    wrong = []
    for name, targets in arrows.items():
        room = room_of(name)
        if room is None:
            wrong.append(f"{name} has no room: add it to ROOMS in tests/test_architecture.py")
            continue
        for target in sorted(targets):
            top = target.split(".")[0]
            if top == PACKAGE:
                other = room_of(target)
                if other != room and other not in ALLOWED[room].split():
                    wrong.append(f"{name} ({room}) imports {target} ({other or 'no room'})")
            elif top in ("tests", "benchmarks", "kernels"):
                wrong.append(f"{name} imports {target}")
            elif top not in sys.stdlib_module_names and (
                top not in LIBRARIES.get(room, {top}) or top in FORBIDDEN.get(room, set())
            ):
                wrong.append(f"{name} ({room}) imports {top}")
    return wrong


def cycle(arrows: dict[str, set[str]]) -> list[str] | None:
    """One cycle of imports, or None. A package's own __init__ counts as a module like any other."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in arrows:
            return None
        for target in sorted(arrows[name]):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(arrows) if (found := walk(name, []))), None)


def test_every_module_has_a_room_and_no_arrow_points_up() -> None:
    assert wrong_arrows(graph()) == []


def test_examples_stand_on_the_losses_and_the_operations_alone() -> None:
    imported = {
        target
        for name, targets in graph().items()
        if room_of(name) == "examples"
        for target in targets
        if target.startswith(PACKAGE)
    }
    assert imported == {"ppo_nlu.losses", "ppo_nlu.ops"}


def test_there_is_no_cycle() -> None:
    assert cycle(graph()) is None


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ppo_nlu.losses", "import numpy"),
        ("ppo_nlu.losses", "from ppo_nlu import config"),
        ("ppo_nlu.advantages", "def f():\n    import ppo_nlu.ops"),
        ("ppo_nlu.tasks.glue", "import torch.nn"),
        ("ppo_nlu.tasks.metrics", "from torch import Tensor"),
        ("ppo_nlu.model.lora", "from ppo_nlu.methods import rollout"),
        ("ppo_nlu.methods.ppo", "from ppo_nlu.train import main"),
        ("ppo_nlu.training.run", "from ppo_nlu.train import main"),
        ("ppo_nlu.train", "from tests import tiny"),
        ("ppo_nlu.kernels.gae", "from ppo_nlu import errors"),
        ("ppo_nlu.kernels.gae", "import numpy"),
        ("ppo_nlu.ops", "import kernels.gae"),
        ("ppo_nlu.examples.ppo_loop", "from ppo_nlu.config import Config"),
        ("ppo_nlu.train", "from ppo_nlu.examples import ppo_loop"),
        ("ppo_nlu.brand_new", "import torch"),
    ],
)
def test_a_wrong_arrow_is_seen(name: str, source: str) -> None:
    known = set(modules()) | {"ppo_nlu.config", "ppo_nlu.methods.rollout", "ppo_nlu.errors"}
    assert wrong_arrows({name: imports(name, source, False, known)})


def test_a_cycle_is_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
