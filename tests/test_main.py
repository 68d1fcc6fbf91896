"""`python -m ppo_nlu`: the programs, the configs of the package, the keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ppo_nlu import __main__ as door
from ppo_nlu.config import Config, load_config, shipped
from ppo_nlu.config.fields import schema
from ppo_nlu.runtime import arguments, cli

ROOT = Path(__file__).parents[1]


def run(*words: str) -> int:
    return cli.run(door.main, list(words))


def test_every_program_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    package = ROOT / "ppo_nlu"
    files = [*package.glob("*.py"), *package.glob("*/__main__.py")]
    runs = [path for path in files if '__name__ == "__main__"' in path.read_text("utf-8")]
    names = {(path.parent if path.stem == "__main__" else path).stem for path in runs}
    assert set(door.PROGRAMS) == names - {"ppo_nlu"}
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    for name in names - {"ppo_nlu"}:
        assert sum(line.startswith(f"python -m ppo_nlu.{name} ") for line in lines) == 1
    assert run("train", "configs/sst2.yaml") == 2
    assert "type python -m ppo_nlu.train" in capsys.readouterr().err


def test_the_configs_are_listed_printed_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    here = [path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")]
    assert sorted(lines[::2]) == sorted(map(str, here))
    place = lines.index("sst2.yaml")
    assert lines[place + 1].strip() == (
        "SST-2 (is a film review positive or negative?) with PPO on the small bundled model, on "
        "two CPU cores."
    )
    text = (ROOT / "configs" / "sst2.yaml").read_text("utf-8")
    for name in ("sst2", "sst2.yaml", "configs/sst2.yaml"):
        assert run("configs", name) == 0
        assert capsys.readouterr().out == text
    copy = str(tmp_path / "own.yaml")
    assert run("configs", "tiny/smoke", "--output", copy) == 0
    assert Path(copy).read_bytes() == (ROOT / "configs/tiny/smoke.yaml").read_bytes()
    capsys.readouterr()
    for words, said in (
        (["sst2", "--output", copy], "exists already"),
        (["sst3"], "sst3: no such config; there are "),
        (["--output", copy], "name the config"),
    ):
        assert run("configs", *words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_every_key_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("keys") == 0
    text = capsys.readouterr().out
    assert re.findall(r"^([a-z_.0-9]+)=", text, re.M) == list(schema(Config))
    assert run("keys", "optim.lr") == 0
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "optim.lr=9e-6; 1e-5 with method=grpo; 0.0002 with method=sft; 2e-5 with method=encoder",
        "    highest learning rate",
        "    (number, > 0, ≤ 10)",
    ]
    assert run("keys", "custom") == 0
    names = re.findall(r"^([a-z_.0-9]+)=", capsys.readouterr().out, re.M)
    assert names == [key for key in schema(Config) if key.startswith("custom.")]
    assert run("keys", "optm") == 2
    assert "optm: no such section or key; did you mean optim?" in capsys.readouterr().err


def test_a_config_of_the_package_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing of that name is here; a line says so."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs/sst2.yaml", "sst2.yaml"):
        found = arguments.config_file(name)
        assert load_config(found) == load_config(ROOT / "configs" / "sst2.yaml")
        error = capsys.readouterr().err
        assert error.startswith(f"note: there is no {name} here; ") and error.count("\n") == 1
    for name in ("sst2", "other/sst2.yaml", "configs/sst3.yaml", str(tmp_path / "sst2.yaml")):
        assert arguments.config_file(name) == name
    Path("sst2.yaml").write_text("task: cola\n")
    assert arguments.config_file("sst2.yaml") == "sst2.yaml"
    assert capsys.readouterr().err == ""


def test_every_config_says_what_it_is_for() -> None:
    assert all(shipped.purpose(name).endswith(".") for name in shipped.names())
