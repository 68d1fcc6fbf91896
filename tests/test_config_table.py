"""Every config key stands in `configs/README.md` with its meaning, as the dataclasses have it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import config_table
import pytest

from ppo_nlu.config import METHOD_DEFAULTS, PRESETS, Config, key_table, number, one_of
from ppo_nlu.config.fields import schema


@dataclass(frozen=True)
class Inner:
    """One section."""

    # Said above. And on a second line.
    above: int = 1
    behind: str = one_of("a", "a", "b")  # said behind

    # A comment with a blank line below belongs to no field.

    none: bool = False
    both: float | None = number(
        None, min=0, max=1, exclusive_min=True
    )  # of several lines | "#" in it


@dataclass(frozen=True)
class Outer:
    """The whole."""

    name: str = "#"  # the name
    inner: Inner = field(default_factory=Inner)


def document() -> str:
    return config_table.DOCUMENT.read_text(encoding="utf-8")


def test_the_meaning_is_the_comment_at_the_field() -> None:
    assert key_table.meanings(Outer) == {
        "name": "the name",
        "inner.above": "Said above. And on a second line.",
        "inner.behind": "said behind",
        "inner.none": "",
        "inner.both": 'of several lines | "#" in it',
    }


def test_every_key_is_in_the_document_with_its_meaning() -> None:
    tables = document().partition(config_table.BEGIN)[2].partition("### Defaults by method")[0]
    rows = re.findall(r"^\| `([a-z_.0-9]+)` \| `[^`]+` \| [^|]+ \| (.+) \|$", tables, re.M)
    assert [key for key, _ in rows] == list(schema(Config))
    assert not [key for key, meaning in rows if len(meaning) < 4]


def test_every_section_says_what_it_is() -> None:
    sections = re.findall(r"^### ([a-z]+)\n\n(.+)\n\n\| key", document(), re.M)
    keys = list(schema(Config))
    assert [name for name, _ in sections] == list(
        dict.fromkeys(key.split(".")[0] for key in keys if "." in key)
    )


def test_the_document_is_what_the_program_writes() -> None:
    mend = "run: python -m tests.config_table --write"
    assert document() == config_table.written(document()), mend


@pytest.mark.parametrize(
    "row",
    [
        "| `rollout.batch_size` | `16` | whole number, ≥ 1 | prompts a step |",
        "| `ppo.lam` | `0.95` | number, ≥ 0, ≤ 1 | lambda of GAE |",
        "| `grpo.scale` | `true` | true or false | group: divide by the group's deviation; "
        "false: Dr. GRPO |",
        "| `optim.lr` | `9e-6` | number, > 0, ≤ 10 | highest learning rate |",
        "| `custom.fields` | `[]` | list | the text columns of the prompt |",
        "| `optim.name` | `adafactor` | `adamw` | `adamw` | `adamw` |",
        "| `optim.lr` | `9e-6` | `1e-5` | `0.0002` | `2e-5` |",
    ],
)
def test_rows_are_as_written_by_hand(row: str) -> None:
    """Read off ppo_nlu.config by eye."""
    assert row in document().splitlines()


def test_defaults_of_methods_and_presets_are_listed() -> None:
    tables = config_table.tables().partition("### Defaults by method")[2]
    keys = {key for own in (*METHOD_DEFAULTS.values(), *PRESETS.values()) for key in own}
    assert not [key for key in keys if f"`{key}" not in tables]


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks a marker"):
        config_table.written("# Configs\n" + config_table.BEGIN)
