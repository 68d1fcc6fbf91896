"""A run folder, or a config, as a model that answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppo_nlu.answering.answer import Answerer
from ppo_nlu.answering.by_encoder import EncoderAnswerer
from ppo_nlu.answering.by_policy import PolicyAnswerer
from ppo_nlu.answering.stored_config import resume_command, stored_config
from ppo_nlu.config import Config
from ppo_nlu.config.idle_keys import reads
from ppo_nlu.data.shots import Shots
from ppo_nlu.errors import UserError
from ppo_nlu.methods import encoder_load, encoder_save
from ppo_nlu.methods.encoder_model import Encoder
from ppo_nlu.model import lora, peft_format
from ppo_nlu.model.load import adapter_folder, load_policy
from ppo_nlu.model.policy import Policy
from ppo_nlu.model.value_head import VALUE_HEAD
from ppo_nlu.runtime import checkpoint
from ppo_nlu.runtime.run_folder import require_run_dir
from ppo_nlu.storage.folders import read_tensors
from ppo_nlu.tasks.custom import specs_of

CHECKPOINT_HELP = "take the weights of this checkpoint (default: those of the end of the run)"


def run_config(
    run_dir: str | Path, overrides: Sequence[str] = (), which: str | None = None
) -> Config:
    """The config of a run; a UserError where it is none, or where the weights are not there: those
    of its end, or of the checkpoint `which`."""
    folder = require_run_dir(run_dir)
    cfg = stored_config(folder, overrides)
    if which is not None:
        checkpoint.named(folder, which)
        return cfg
    kept = trained_folder(folder, cfg)
    if not (kept / _kind(cfg).mark).is_file():
        raise UserError(
            f"{folder}: the run has not finished and left no {kept.name}/; "
            f"finish it with {resume_command(folder, cfg)}"
        )
    return cfg


def trained_folder(run_dir: str | Path, cfg: Config) -> Path:
    """Where a run leaves what it has learned."""
    return Path(run_dir) / _kind(cfg).folder


def start_folder(cfg: Config) -> Path:
    """Where the weights of `init_from` are."""
    return _kind(cfg).start(str(cfg.init_from))


def load_trained(cfg: Config, run_dir: str | Path, which: str | None = None) -> Answerer:
    """The model of a finished run as it was trained, or as it was at the checkpoint `which`."""
    kind, folder = _kind(cfg), Path(run_dir)
    if which is None:
        return answerer_of(kind.load(cfg, folder), cfg)
    path = checkpoint.named(folder, which)
    groups, _ = checkpoint.load(path)
    if kind.folder not in groups:
        raise UserError(f"{path}: holds no weights of method: {cfg.method}; name its own run")
    return answerer_of(kind.kept(cfg, groups, str(path)), cfg)


def load_base(cfg: Config) -> Answerer:
    """The model that a config starts from."""
    return answerer_of(_kind(cfg).base(cfg), cfg)


def answerer_of(model: Any, cfg: Config, shots: Shots | None = None) -> Answerer:
    """The model that `cfg.method` trains, as an `Answerer`; with the `shots` of a run, if any."""
    return _kind(cfg).answerer(model, cfg, shots)


# ---- the two kinds of models -----------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How a kind of model is loaded, and what a run that trained one leaves."""

    folder: str  # in the run folder
    mark: str  # a file in it that is there once the run has finished
    answerer: Callable[[Any, Config, Shots | None], Answerer]
    load: Callable[[Config, Path], Any]
    kept: Callable[[Config, checkpoint.Tensors, str], Any]  # from the groups of a checkpoint
    base: Callable[[Config], Any]
    start: Callable[[str], Path]  # finds the weights that `init_from` names


def _kind(cfg: Config) -> Kind:
    return _ENCODER if cfg.method == "encoder" else _POLICY


def _trained_policy(cfg: Config, run_dir: Path) -> Policy:
    """The policy with its trained adapter and, where a critic was trained, its value head."""
    adapter = run_dir / _POLICY.folder
    policy = load_policy(replace(cfg, init_from=None))  # the run's own adapter is whole
    peft_format.load_adapter(policy.model, adapter)
    if not reads(cfg, "model.value_head"):
        return policy  # no critic was trained
    path = adapter / VALUE_HEAD
    try:
        head = read_tensors(path)
    except UserError as error:
        raise UserError(
            f"{error}; resume the run's last step to write the value head again: "
            f"{resume_command(run_dir, cfg)}"
        ) from error
    lora.take(policy.value_head.state_dict(), head, str(path))
    return policy


def _kept_policy(cfg: Config, groups: checkpoint.Tensors, place: str) -> Policy:
    policy = load_policy(replace(cfg, init_from=None))
    lora.load_state_dict(policy.model, groups["adapter"], place)
    if "value_head" in groups:
        lora.take(policy.value_head.state_dict(), groups["value_head"], place)
    return policy


def _kept_encoder(cfg: Config, groups: checkpoint.Tensors, place: str) -> Encoder:
    encoder = encoder_load.load(replace(cfg, init_from=None), specs_of(cfg)[cfg.names[0]])
    encoder_save.take(encoder.model, groups["encoder"], True, place)
    return encoder


def _trained_encoder(cfg: Config, run_dir: Path) -> Encoder:
    return encoder_load.load_saved(cfg, specs_of(cfg)[cfg.names[0]], run_dir / _ENCODER.folder)


def _no_encoder(cfg: Config) -> None:
    raise UserError("method: an encoder answers only after training; give its run folder")


_POLICY = Kind(
    folder="adapter",
    mark=peft_format.CONFIG_FILE,
    answerer=PolicyAnswerer,
    load=_trained_policy,
    kept=_kept_policy,
    base=load_policy,
    start=adapter_folder,
)
_ENCODER = Kind(
    folder=encoder_save.FOLDER,
    mark="config.json",
    answerer=EncoderAnswerer,
    load=_trained_encoder,
    kept=_kept_encoder,
    base=_no_encoder,
    start=encoder_load.saved_folder,
)
