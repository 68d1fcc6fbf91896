"""Fixtures for all tests: no test reads the user's settings, cache or the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
GIVEN = os.environ.get("PPO_NLU_DATA")  # before the tests clear it


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the whole session, so that programs started by a test inherit it. Proxies that refuse
    keep every library off the network; servers on 127.0.0.1 are reached directly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PPO_NLU_DATA", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data (it holds glue/), from $PPO_NLU_DATA or ../shared/data."""
    for folder in (Path(GIVEN) if GIVEN else None, ROOT.parent / "shared" / "data"):
        if folder and any(folder.glob("**/SST-2/train.tsv")):
            return folder
    pytest.skip("needs the real SST-2: set PPO_NLU_DATA to the folder that holds glue/")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it, of the bundled model with random LoRA weights."""
    from safetensors.torch import save_file

    from ppo_nlu.config import dump, load_config
    from ppo_nlu.model import BUNDLED, lora, peft_format
    from ppo_nlu.model.load import load_policy
    from ppo_nlu.runtime import run_folder

    if not (BUNDLED / "config.json").is_file():
        pytest.skip("the bundled model is not in ppo_nlu/assets")
    root = tmp_path_factory.mktemp("finished")
    (root / "run.yaml").write_text(
        'task: sst2\ndata: {fallback: bundled, url: "http://127.0.0.1:9"}\nlora: {r: 4}\n'
        "rollout: {max_new_tokens: 6}\neval: {limit: 20, batch_size: 8, bootstrap: 50}\n"
    )
    cfg = load_config(root / "run.yaml")
    folder = root / "run"
    run_folder.claim(folder, dump(cfg)).release()
    policy = load_policy(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in lora.lora_parameters(policy.model):
            weight.copy_(0.03 * torch.randn(weight.shape, generator=generator))
    (folder / "adapter").mkdir()
    save_file(policy.value_head.state_dict(), folder / "adapter" / "value_head.safetensors")
    peft_format.save_adapter(policy.model, folder / "adapter", cfg.lora, "bundled")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config of a short run; see `short_run`."""
    from short_run import CONFIG

    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of that config that nothing disturbed."""
    from short_run import CONFIG, QUICK, run

    root = tmp_path_factory.mktemp("whole")
    (root / "tiny.yaml").write_text(CONFIG)
    assert run(root / "tiny.yaml", *QUICK, "--output", root / "run") == 0
    return root / "run"
