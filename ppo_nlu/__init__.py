"""ppo_nlu: reinforcement learning from labels for language understanding, from scratch in PyTorch.

Importing this package imports nothing heavy; `ppo_nlu.losses` needs torch alone.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the kernels live beside this package, in a folder that must not be importable as a
# top-level `kernels` (transformers probes for a package of that name). Installed wheels map the
# folder to ppo_nlu.kernels; in a checkout the repository root is one more place to look for it.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels" / "token_logprobs.py").is_file():
    __path__.append(str(_root))
