"""ppo_nlu: reinforcement learning from labels for language understanding, from scratch in PyTorch.

Importing this package imports nothing heavy; `ppo_nlu.losses` needs torch alone.
"""

import os
import signal
import sys
from pathlib import Path

__version__ = "0.1.0"

# In a checkout the kernels live beside this package, in a folder that must not be importable as a
# top-level `kernels` (transformers probes for a package of that name). Installed wheels map the
# folder to ppo_nlu.kernels; in a checkout the repository root is one more place to look for it.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels" / "token_logprobs.py").is_file():
    __path__.append(str(_root))


def _begin_program() -> None:
    """What cannot wait for a program's imports, which take seconds.

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
