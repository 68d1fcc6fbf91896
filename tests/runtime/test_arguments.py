"""Unknown flags, and places where nothing can be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_nlu.errors import UserError
from ppo_nlu.runtime import arguments, cli


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "1e-4"], ["--learning_rate", "did you mean optim.lr?"]),
        (["--num-generations=4"], ["did you mean rollout.samples_per_prompt?"]),
        (["--beta", "0.1"], ["ppo.kl_coef or grpo.kl_coef"]),
        (["--ouptut", "x"], ["did you mean --output?"]),
        (["--seed", "3"], ["write seed=value"]),
        (["--optim.lr", "3"], ["write optim.lr=value"]),
        (["--zzzzzz"], ["unrecognized arguments: --zzzzzz", "--help"]),
    ],
)
def test_unknown_flags(
    flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        parser = arguments.Parser("program")
        parser.add_argument("config")
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--output")
        parser.parse_intermixed_args(argv)
        return 0

    assert cli.run(main, ["a.yaml", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("file/run", "is not a folder"),
        ("file/a/b/run", "is not a folder"),
        ("x" * 300, "too long"),
        ("a/" + "x" * 5000, "too long"),
        ("a/" * 3000, "too long"),
        ("loop/x", "cannot be"),
    ],
)
def test_places_where_nothing_can_be_made(tmp_path: Path, path: str, word: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=word):
        arguments.require_place("--output", tmp_path / path)
    assert arguments.require_place("--output", tmp_path / "new" / "run") == tmp_path / "new" / "run"
    assert arguments.require_place("--output", Path("run")) == Path("run")
