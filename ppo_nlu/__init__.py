"""ppo_nlu: reinforcement learning from labels for language understanding, from scratch in PyTorch.

Importing this package imports nothing heavy; `ppo_nlu.losses` needs torch alone.
"""

import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_KERNELS = Path(__file__).resolve().parent.parent / "kernels"


class _Kernels:
    """Finds `ppo_nlu.kernels` in a checkout, where the kernels live beside this package.

    Their folder must not be importable as a top-level `kernels`: transformers probes for a package
    of that name. Installed wheels hold the folder as ppo_nlu/kernels.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The folder as a package without a module of its own; None for every other name."""
        if name != f"{__name__}.kernels":
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(_KERNELS)]
        return spec


if (_KERNELS / "token_logprobs.py").is_file() and (_KERNELS.parent / "setup.py").is_file():
    sys.meta_path.append(_Kernels)


def _begin_program() -> None:
    """Early program setup: Ctrl-C and closed streams. A program's imports take seconds.

    Ctrl-C ends it with 130 and no traceback (`cli.run` takes over later). A standard stream that
    the caller closed gets a place to go, or the next file that is opened would take its number,
    and with it all that is printed.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)


if sys.argv[:1] == ["-m"]:  # Python is about to run a module of this package as a program
    _begin_program()
