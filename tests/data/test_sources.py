"""Where a task's files are looked for, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_nlu.config import DataConfig
from ppo_nlu.data import load_split, locate
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Label, TaskSpec, get_task
from tests.data.files import SST2, fill, says


@pytest.mark.parametrize("inner", [".", "SST-2", "glue/SST-2"])
@pytest.mark.parametrize("kind", ["data.path", "$PPO_NLU_DATA"])
def test_a_named_folder_may_be_the_task_the_benchmark_or_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str, kind: str
) -> None:
    folder = fill(tmp_path / inner)
    if kind == "data.path":
        cfg = DataConfig(path=str(tmp_path))
    else:
        cfg = DataConfig()
        monkeypatch.setenv("PPO_NLU_DATA", str(tmp_path))
    source = locate(SST2, cfg)
    assert (source.kind, source.folder) == (kind, folder)
    assert str(folder) in source.note and kind in source.note
    assert load_split(SST2, "dev", cfg).source == str(folder)


def test_the_places_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("path", "environment", "given_cache", "cache/ppo_nlu"):
        fill(tmp_path / name / "glue/SST-2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert locate(SST2, DataConfig()).folder == tmp_path / "cache/ppo_nlu/glue/SST-2"
    given = str(tmp_path / "given_cache")
    source = locate(SST2, DataConfig(cache=given))
    assert (source.kind, source.folder) == ("cache", Path(given) / "glue/SST-2")
    monkeypatch.setenv("PPO_NLU_DATA", str(tmp_path / "environment"))
    assert locate(SST2, DataConfig(cache=given)).kind == "$PPO_NLU_DATA"
    cfg = DataConfig(cache=given, path=str(tmp_path / "path"), fallback="bundled")
    assert locate(SST2, cfg).kind == "data.path"


def test_the_cache_is_in_the_home_folder_where_xdg_says_nothing_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / ".cache/ppo_nlu/glue/SST-2")
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert locate(SST2, DataConfig()).folder == folder
    assert locate(SST2, DataConfig(path="~/.cache/ppo_nlu")).folder == folder


@pytest.mark.parametrize("kind", ["data.path", "$PPO_NLU_DATA"])
@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_a_named_place_without_the_task_is_an_error_and_no_fall_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    (tmp_path / "empty" / "glue").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    cache = fill(tmp_path / "cache")
    place = str(tmp_path / name)
    cfg = DataConfig(fallback="bundled", cache=str(cache))
    if kind == "data.path":
        cfg = DataConfig(fallback="bundled", cache=str(cache), path=place)
    else:
        monkeypatch.setenv("PPO_NLU_DATA", place)
    with pytest.raises(UserError) as error:
        locate(SST2, cfg)
    says(error, kind, place, "SST-2", "train.tsv", "glue/SST-2")


def test_a_task_without_archive_or_stand_in_asks_for_a_folder(tmp_path: Path) -> None:
    labels = (Label("Yes", "1"), Label("No", "0"))
    files = {"train": ("train.tsv",)}
    other = TaskSpec("x", "X", "glue", "X", "", "{a}", ("a",), labels, files=files)
    with pytest.raises(UserError) as error:
        locate(other, DataConfig(cache=str(tmp_path), fallback="bundled"))
    says(error, "data.path", "no archive of X is known", "glue/X/")


def test_the_folder_of_another_task_is_not_taken(tmp_path: Path) -> None:
    text = "sentence\tlabel\nfine\t1\n"
    for name in ("SST-2", "plain"):
        (tmp_path / "glue" / name).mkdir(parents=True)
        (tmp_path / "glue" / name / "dev.tsv").write_text(text)
    sst2, mr = get_task("sst2"), get_task("mr")
    for root in ("glue/SST-2", "glue", "."):
        assert load_split(sst2, "dev", DataConfig(path=str(tmp_path / root))).examples
    for task in (mr, get_task("cola")):
        with pytest.raises(UserError, match=f"does not hold {task.title}"):
            load_split(task, "dev", DataConfig(path=str(tmp_path / "glue/SST-2")))
    assert load_split(mr, "dev", DataConfig(path=str(tmp_path / "glue/plain"))).examples
    # A root that holds files beside the benchmark's folders: the folder comes first.
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nwrong\t0\n")
    assert load_split(sst2, "dev", DataConfig(path=str(tmp_path))).examples[0].label == "Positive"
