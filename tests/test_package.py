"""What importing costs, what it drags in, and what an installed package holds."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, path: Path = ROOT, cwd: Path = ROOT) -> str:
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_losses_is_cheap_beside_torch() -> None:
    code = "import time, torch; t = time.process_time(); import ppo_nlu.losses; "
    seconds = min(float(run(code + "print(time.process_time() - t)")) for _ in range(3))
    assert seconds < 0.2


@pytest.mark.parametrize("module", ["ppo_nlu.losses", "ppo_nlu.ops"])
def test_importing_the_maths_drags_in_torch_alone(module: str) -> None:
    """Compared with torch itself, which may import some of these on its own."""
    code = "import sys, torch; before = set(sys.modules); import {}; print(*[m for m in sys.modules"
    code += " if m not in before and m.split('.')[0] not in sys.stdlib_module_names])"
    new = run(code.format(module)).split()
    assert [m for m in new if not m.startswith("ppo_nlu")] == []
    assert "triton" not in run(f"import sys, {module}; print(*(m for m in sys.modules))").split()


def test_importing_the_package_does_not_import_torch() -> None:
    assert run("import sys, ppo_nlu; print('torch' in sys.modules)") == "False"


def test_the_kernels_are_no_package_of_their_own() -> None:
    """A top-level `kernels` would shadow the Hugging Face package that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["tests", "benchmarks", "setup"])
def test_nothing_else_beside_the_package_belongs_to_it(name: str) -> None:
    code = f"import importlib.util as u, ppo_nlu; print(u.find_spec('ppo_nlu.{name}'))"
    assert run(code) == "None"


def test_a_foreign_kernels_package_and_ours_live_side_by_side(tmp_path: Path) -> None:
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("owner = 'theirs'\n")
    env_path = os.pathsep.join((str(ROOT), str(tmp_path)))
    code = (
        "import kernels, importlib.util as u; import ppo_nlu; "
        "print(kernels.owner, u.find_spec('ppo_nlu.kernels.gae').origin)"
    )
    owner, origin = run(code, Path(env_path), tmp_path).split(maxsplit=1)
    assert owner == "theirs" and Path(origin) == ROOT / "kernels" / "gae.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # built from a copy: the build leaves files beside the sources
    source.mkdir()
    files = ("setup.py", "pyproject.toml", "LICENSE", "README.md")
    for name in (*files, "ppo_nlu", "kernels", "configs"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet",
         "--wheel-dir", str(folder)],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("ppo_nlu-*.whl"))


def test_the_wheel_holds_all_and_no_top_level_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"ppo_nlu"}
    for folder, prefix in (
        (ROOT / "ppo_nlu", "ppo_nlu"),
        (ROOT / "kernels", "ppo_nlu/kernels"),
        (ROOT / "configs", "ppo_nlu/configs"),
    ):
        here = {
            f"{prefix}/{path.relative_to(folder).as_posix()}"
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert here <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_is_for(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(name).decode())
    assert {"PPO", "LoRA", "GLUE"} <= set(said["Keywords"].split(","))
    assert "Typing :: Typed" in said.get_all("Classifier")


def test_the_installed_configs_are_found_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from ppo_nlu.runtime import arguments; print(arguments.config_file('configs/sst2.yaml'))"
    )
    found = Path(run(code, tmp_path / "site", tmp_path))
    assert found == tmp_path / "site" / "ppo_nlu" / "configs" / "sst2.yaml"
    assert found.read_bytes() == (ROOT / "configs" / "sst2.yaml").read_bytes()


def test_the_wheel_imports_with_a_foreign_kernels_package(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'theirs'\n")
    code = (
        "import kernels, ppo_nlu.ops, importlib.util as u; "
        "print(kernels.owner, u.find_spec('ppo_nlu.kernels.token_logprobs').origin)"
    )
    owner, origin = run(code, tmp_path, tmp_path).split(maxsplit=1)
    assert owner == "theirs" and Path(origin).is_relative_to(tmp_path / "ppo_nlu" / "kernels")
