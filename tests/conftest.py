"""Fixtures for all tests: no test reads the user's settings, cache or the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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
