"""The check at load: what the engine computes must be what the model gives for one row alone.

`choose_path` compares the prefix tree and the plain path with what `as_loaded` has measured, in one
pass and token by token. It says which path may be taken, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppo_nlu.errors import UserError
from ppo_nlu.model.as_loaded import AsLoaded, Probe, Trial, first_layers
from ppo_nlu.model.refusal import reason_of, unsupported
from ppo_nlu.model.shape import limit_of, only_attention
from ppo_nlu.tree import pack, passes

EXACT = 1e-4  # how far logits may be apart in fp32, where none is larger than 10
ROUGH = 0.1  # in low precision: the root mean square of the gap, as a share of the logits' spread


class Runner(Protocol):
    """What the check needs of a policy."""

    model: Any
    tokenizer: Any
    decoder: nn.Module
    takes_positions: bool

    @property
    def window(self) -> int | None: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


def choose_path(policy: Runner, path: str, loaded: AsLoaded | None = None) -> bool:
    """Whether the prefix tree may be used: it must give the logits of `loaded` (None: of the model
    as it is now), in one pass and token by token. `path` is `model.path`: auto, tree or plain.

    Where the tree may not be used, the plain path must give these logits; else a UserError.
    """
    if loaded is None:
        limit = limit_of(policy.model, 0)[0]
        loaded = AsLoaded.of(policy.model, policy.tokenizer, limit)
    if path != "plain":
        reason = _against_the_tree(policy, loaded)
        if reason is None:
            return True
        if path == "tree":
            raise UserError(f"model.path: in the prefix tree this model {reason}; use auto")
    if reason := _objection(policy, [*loaded.near, *loaded.far], False):
        raise unsupported(policy.model, reason)
    return False


def _against_the_tree(policy: Runner, loaded: AsLoaded) -> str | None:
    if policy.window is not None and policy.window < loaded.near[0].probe.longest:
        return f"has a window of {policy.window} tokens, too short to be checked"
    if not policy.takes_positions or not only_attention(policy.decoder.config):
        return "takes no positions, or has layers that do not attend"
    return _objection(policy, loaded.near, True)


def longest_row(policy: Runner, loaded: AsLoaded) -> int | None:
    """Where rows must end: at the window, if the plain path, which takes longer rows, is wrong
    there. None where it is right, or where there was nothing to try."""
    return policy.window if _objection(policy, loaded.far, False) else None


@torch.no_grad()
def _objection(policy: Runner, trials: Sequence[Trial], packed: bool) -> str | None:
    """What is wrong with a path (`packed`: the tree) in these trials; None: nothing."""
    for trial in trials:
        try:
            with first_layers(policy.decoder) if trial.first_layers else nullcontext():
                passes = [run(policy, trial.probe, packed) for run in (_in_one_pass, _decoded)]
            found = [x.float() if trial.first_layers else policy.logits(x) for x in passes]
        except (torch.cuda.OutOfMemoryError, MemoryError, UserError):
            raise
        except Exception as error:  # attention, or a cache, of its own kind
            return f"cannot be run in batches ({reason_of(error)})"
        for one, where in zip(found, ("padding", "tokens that were run before"), strict=True):
            if not _near(one, trial.expected, trial.exact):
                return f"gives other logits behind {where} than for one row alone"
    return None


def _near(found: Tensor, expected: Tensor, exact: bool) -> bool:
    """Whether logits are the same but for rounding; never with NaN among them."""
    gap = found - expected
    if exact:
        return float(gap.abs().max()) <= EXACT * max(1.0, float(expected.abs().max()) / 10)
    spread = expected - expected.mean(-1, keepdim=True)
    return float(gap.square().mean()) <= ROUGH**2 * float(spread.square().mean())


def _in_one_pass(policy: Runner, probe: Probe, packed: bool) -> Tensor:
    """The states that predict the answers' tokens (N, H), all tokens run at once."""
    tree = pack.build(probe.prompts, probe.answers, probe.prompt_of, packed)
    tree = tree.to(_device(policy))
    flat, _ = passes.run(policy.decoder, tree, policy.takes_positions)
    return flat.index_select(0, tree.predicted_from[tree.mask])


def _decoded(policy: Runner, probe: Probe, packed: bool) -> Tensor:
    """The same states, the answers run token by token; a row leaves the batch when it is over."""
    device, prompt_of, answers = _device(policy), probe.prompt_of, probe.answers
    tree = pack.build(probe.prompts, packed=packed).to(device)
    _, prompt_pass = passes.run(policy.decoder, tree, policy.takes_positions, keep=True)
    cache = prompt_pass.decode_cache(prompt_of, max(map(len, answers)) - 1)
    rows = list(range(len(answers)))
    states = [[prompt_pass.ends[p]] for p in prompt_of]
    for step in range(max(map(len, answers)) - 1):
        going = [i for i, row in enumerate(rows) if len(answers[row]) > step + 1]
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[i] for i in going]
        token = torch.tensor([answers[row][step] for row in rows], device=device)
        positions = [len(probe.prompts[prompt_of[row]]) + step for row in rows]
        position_ids = torch.tensor(positions, device=device) if policy.takes_positions else None
        for row, hidden in zip(rows, cache.step(policy.decoder, token, position_ids), strict=True):
            states[row].append(hidden)
    return torch.stack([hidden for row in states for hidden in row])


def _device(policy: Runner) -> torch.device:
    return next(policy.decoder.parameters()).device
