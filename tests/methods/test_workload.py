"""What each method says that its steps run at once, counted by hand from its config."""

from __future__ import annotations

import pytest
import tiny

from ppo_nlu.config import Config, EvalConfig, GRPOConfig, PPOConfig, RolloutConfig, SFTConfig
from ppo_nlu.methods.grpo import GRPO
from ppo_nlu.methods.ppo import PPO
from ppo_nlu.methods.sft import SFT
from ppo_nlu.methods.workload import Workload

ROLLOUT = RolloutConfig(batch_size=3, samples_per_prompt=4)  # 12 answers


@pytest.mark.parametrize(
    ("given", "minibatch", "per_prompt"), [(5, 5, 1), (12, 12, 4), (99, 12, 4)]
)
def test_ppo_runs_minibatches_and_a_critic(given: int, minibatch: int, per_prompt: int) -> None:
    cfg = Config(task="sst2", rollout=ROLLOUT, ppo=PPOConfig(minibatch_size=given))
    found = PPO(cfg, tiny.SPECS, tiny.policy()).workload()
    assert found == Workload(3, 4, minibatch, 0, per_prompt, critic=True, rollout=True)


def test_grpo_runs_all_answers_of_a_step_without_a_critic() -> None:
    section = GRPOConfig(micro_batch_size=2)
    cfg = Config(task="sst2", method="grpo", rollout=ROLLOUT, grpo=section)
    found = GRPO(cfg, tiny.SPECS, tiny.policy()).workload()
    assert found == Workload(3, 4, 12, 2, 4, critic=False, rollout=True)


def test_sft_runs_rows_and_draws_answers_in_evaluations_alone() -> None:
    section = SFTConfig(batch_size=6, micro_batch_size=4)
    cfg = Config(task="sst2", method="sft", sft=section, eval=EvalConfig(batch_size=9))
    assert SFT(cfg, tiny.SPECS, tiny.policy()).workload() == Workload(9, 1, 6, 4, 1)
