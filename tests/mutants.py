"""The mutants of `tests.mutations`: each is one wrong line, and the tests that must notice it.

A snippet has to be in its file just once; short lines that say one thing stay so the longest.
It is one file because it is a table of data, in the order of the files that it changes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; `tests` are files or nodes, the quickest first.

    `equivalent` is the reason why no test can tell the difference, where none can.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
    equivalent: str = ""


def of(file: str, *tests: str, **mutants: tuple[str, ...]) -> list[Mutant]:
    """Mutants of one file with the same tests: name=(old, new, why), or with `equivalent` too."""
    places = []
    for test in tests:
        name, colons, node = test.partition("::")
        folder, slash, stem = name.rpartition("/")
        places.append(f"tests/{folder}{slash}test_{stem}.py{colons}{node}")
    return [
        Mutant(name, f"ppo_nlu/{file}.py", old, new, tuple(places), why, *reason)
        for name, (old, new, why, *reason) in mutants.items()
    ]


# ---- losses and advantages ------------------------------------------------------------------

LOSSES = of(
    "losses",
    "losses",
    "methods/published_bugs",
    "ops/ppo_loss",
    loss_old_not_detached=(
        "counted(logprobs, mask) - counted(old_logprobs, mask).detach()",
        "counted(logprobs, mask) - counted(old_logprobs, mask)",
        "old log-probs are numbers of the rollout",
    ),
    loss_advantages_not_detached=(
        "advantages = counted(advantages, mask).detach()",
        "advantages = counted(advantages, mask)",
        "advantages are numbers of the rollout",
    ),
    loss_clip_high_ignored=(
        "1 + (clip if clip_high is None else clip_high)",
        "1 + clip",
        "the upper bound is the wider one",
    ),
    loss_lower_bound=(
        "ratio.clamp(1 - clip,",
        "ratio.clamp(1 / (1 + clip),",
        "the lower bound is 1 - clip",
    ),
    loss_less_pessimistic=(
        "losses = torch.maximum(free, clipped)  #",
        "losses = torch.minimum(free, clipped)  #",
        "of two losses the larger one counts",
    ),
    loss_dual_clip_of_good=(
        "torch.where(advantages < 0, torch.minimum",
        "torch.where(advantages > 0, torch.minimum",
        "the dual clip is for negative advantages",
    ),
    loss_log_ratio_unbounded=(
        "log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()",
        "log_ratio.exp()",
        "one token overflows the sum",
    ),
    loss_kl_without_half=(
        '"policy/approx_kl": 0.5 * log_ratio',
        '"policy/approx_kl": log_ratio',
        "k2 has a half",
    ),
    loss_padding_in_ratio=(
        "log_ratio.detach(), counted(ratio.detach(), mask)",
        "log_ratio.detach(), ratio.detach()",
        "the ratio of padding is 1 and would count in the mean",
    ),
    value_clip_around_returns=(
        "torch.clamp(values, old - clip, old + clip)",
        "torch.clamp(values, returns - clip, returns + clip)",
        "values are clipped around those of the rollout",
    ),
    value_clip_less_pessimistic=(
        "losses = torch.maximum(free, (clipped - returns).square())",
        "losses = torch.minimum(free, (clipped - returns).square())",
        "of two losses the larger one counts",
    ),
    value_returns_not_detached=(
        "counted(values, mask), counted(returns, mask).detach()",
        "counted(values, mask), counted(returns, mask)",
        "returns are numbers of the rollout",
    ),
    value_coef_ignored=(
        "loss + value_coef * critic",
        "loss + 0.5 * critic",
        "the config's coefficient counts",
    ),
    entropy_sign=(
        "loss - entropy_coef * mean",
        "loss + entropy_coef * mean",
        "a bonus lowers the loss",
    ),
    td_target_not_detached=(
        "F.pad(values.detach()[:, 1:], (0, 1))",
        "F.pad(values[:, 1:], (0, 1))",
        "the TD target is a constant",
    ),
    kl_reversed=(
        "d = full_precision(ref_logprobs) - full_precision(logprobs)",
        "d = full_precision(logprobs) - full_precision(ref_logprobs)",
        "KL is that of the policy to the reference",
    ),
    exact_kl_weights=(
        "return (p * (logp - logq)",
        "return (logq.exp() * (logp - logq)",
        "it is weighted by π",
    ),
    grpo_kl_sign=(
        "loss + kl_coef * kl if kl_coef",
        "loss - kl_coef * kl if kl_coef",
        "KL is a penalty",
    ),
    grpo_reference_not_detached=(
        "reference = counted(ref_logprobs, mask).detach()",
        "reference = counted(ref_logprobs, mask)",
        "the reference gets no gradient",
    ),
    sft_own_denominator=(
        "-counted(logprobs, mask).sum() / token_count(mask, denominator)",
        "-counted(logprobs, mask).sum() / token_count(mask)",
        "micro-batches are parts of one mean",
    ),
    adaptive_kl_of_one=(
        "* n / self.horizon",
        "/ self.horizon",
        "the horizon is in responses",
    ),
)

ADVANTAGES = of(
    "advantages",
    "advantages",
    "methods/published_bugs",
    gae_without_lambda=(
        "delta + gamma * lam * advantage",
        "delta + gamma * advantage",
        "λ weighs what follows",
    ),
    gae_without_gamma=(
        "rewards[:, t] + gamma * next_value",
        "rewards[:, t] + next_value",
        "γ discounts",
    ),
    gae_value_behind_the_end=(
        "advantage = next_value = torch.zeros_like(values[:, 0])",
        "advantage = torch.zeros_like(values[:, 0])\n    next_value = values[:, -1]",
        "nothing is bootstrapped behind the last token",
    ),
    whiten_biased=(
        "centred.square().sum() / (mask.sum() - 1).clamp(min=1)",
        "centred.square().sum() / n",
        "the variance is the unbiased one",
    ),
    whiten_padding=(
        "    centred = counted(x - mean, mask)",
        "    centred = x - mean",
        "padding has no spread",
    ),
    whiten_shift=(
        "return white if shift_mean else",
        "return white if not shift_mean else",
        "reversed flag",
    ),
    score_one_slot_early=(
        "mask & (counts_from_here == 1)",
        "mask & (counts_from_here == 2)",
        "the score sits on the last token",
    ),
    kl_as_reward=(
        "is_last) - kl_coef * counted",
        "is_last) + kl_coef * counted",
        "KL is a penalty",
    ),
    padding_multiplied=(
        "full_precision(x).masked_fill(~mask, 0.0)",
        "full_precision(x) * mask",
        "NaN in the padding times 0 is NaN",
    ),
    group_biased=(
        "/ max(group_size - 1, 1)",
        "/ group_size",
        "the deviation is the unbiased one",
    ),
    groups_interleaved=(
        "full_precision(scores).reshape(-1, group_size)",
        "full_precision(scores).reshape(group_size, -1).t()",
        "the answers to a prompt lie side by side",
    ),
    group_rounding=(
        "return centred.masked_fill(no_spread, 0.0).reshape(-1)",
        "return centred.reshape(-1)",
        "rounding of equal scores is no signal",
    ),
    group_epsilon=("GROUP_EPS = 1e-4", "GROUP_EPS = 1e-2", "as in the papers' code"),
)

# ---- rollout --------------------------------------------------------------------------------

ROLLOUT = of(
    "methods/sampler",
    "methods/rollout",
    sampled_at_temperature_1=(
        "roll.samples_per_prompt, self.temperature),",
        "roll.samples_per_prompt),",
        "rollout.temperature is that of the draws",
    ),
    same_draws_each_step=(
        'generator=seeded("rollout", self.cfg.seed, step)',
        'generator=seeded("rollout", self.cfg.seed)',
        "each step draws anew",
    ),
    reward_scale_ignored=(
        "rewards.reward(specs[row.task], row, guess, response, self.cfg.reward.scale)",
        "rewards.reward(specs[row.task], row, guess, response)",
        "reward.scale counts",
    ),
    rescored_values_alone=(
        "rollout.logprobs, rollout.values = again.logprobs, again.values",
        "rollout.values = again.values",
        "old log-probs are those of the training pass",
    ),
    reference_with_lora=(
        "        with lora_disabled(policy.model):",
        "        if True:",
        "the reference is the model without LoRA",
    ),
    exact_kl_temperature=(
        "policy.logits(theirs) / temperature)",
        "policy.logits(theirs))",
        "both distributions are those at the temperature",
    ),
    equal_answers_of_other_prompts=(
        "keys = [(p, tuple(answer)) for",
        "keys = [(prompt_of[0], tuple(answer)) for",
        "one answer to two prompts is two rows",
    ),
) + of(
    "methods/rollout",
    "methods/rollout",
    "methods/ppo::test_an_update_that_reuses_the_prompt_pass_has_the_same_gradient",
    "methods/ppo::test_a_pass_that_is_too_long_or_of_few_prompts_is_not_reused",
    "methods/ppo::test_the_kl_of_the_coefficient_is_the_sum_over_an_answer",
    "methods/ppo::test_the_first_ratio_is_told_once_of_each_pass",
    rows_owners=(
        "[place[self.prompt_of[j]] for j in index]",
        "[self.prompt_of[j] for j in index]",
        "prompt_of are numbers in the prompts given back",
    ),
    prompt_pass_given_twice=(
        "prompt_pass, self.prompt_pass = self.prompt_pass, None",
        "prompt_pass = self.prompt_pass",
        "the weights have moved since",
    ),
    used_prompt_pass_is_forgotten=(
        "        prompt_pass, self.prompt_pass = self.prompt_pass, None",
        "        self.used_prompt_pass = False\n"
        "        prompt_pass, self.prompt_pass = self.prompt_pass, None",
        "later passes take nothing back",
    ),
    prompt_pass_of_few_prompts=(
        "used < MOST * len(self.prompts)",
        "used < 0",
        "a pass of its own is cheaper where few prompts have answers",
    ),
    kl_of_a_token=(
        ".sum(1).mean())",
        ".sum(1).mean() / rollout.mask.shape[1])",
        "kl/ref is of an answer",
    ),
)

# ---- PPO, GRPO, SFT and what they share -----------------------------------------------------

PPO = of(
    "methods/ppo",
    "methods/ppo::test_the_loss_of_a_batch_against_loops",
    "methods/ppo::test_rewards_advantages_and_returns_against_loops",
    "methods/ppo::test_every_answer_once_an_epoch_in_a_fresh_order",
    "methods/ppo::test_the_entropy_bonus_raises_the_entropy",
    "methods/ppo::test_the_kl_coefficient_is_steered",
    returns_of_whitened=(
        "            advantages = losses.masked_whiten(advantages, mask)",
        "            advantages = losses.masked_whiten(advantages, mask)\n"
        "            returns = advantages + values",
        "the critic learns rewards, not whitened ones",
    ),
    ppo_temperature_1=(
        "temperature, bonus = self.cfg.rollout.temperature,",
        "temperature, bonus = 1.0,",
        "the update is at the temperature of the draws",
    ),
    rewards_shifted=(
        "masked_whiten(rewards, mask, shift_mean=False)",
        "masked_whiten(rewards, mask)",
        "the mean of rewards says how good they are",
    ),
    rewards_not_whitened=(
        "        if ppo.whiten_rewards:",
        "        if False:",
        "ppo.whiten_rewards has an effect",
    ),
    mean_over_answers=(
        "count = float(rollout.mask[index].sum())",
        "count = float(len(index))",
        "the loss is a mean over tokens",
    ),
    td0_of_returns=(
        "rewards=batch.rewards[rows, :width]",
        "rewards=batch.returns[rows, :width]",
        "the TD error is of rewards",
    ),
    td0_gamma=(
        "                gamma=ppo.gamma,",
        "                gamma=1.0,",
        "γ discounts there too",
    ),
    entropy_detached=(
        "scored.entropy if bonus else",
        "scored.entropy.detach() if bonus else",
        "the bonus has a gradient",
    ),
    same_order_each_epoch=(
        'seeded("update", self.cfg.seed, step, epoch)',
        'seeded("update", self.cfg.seed, step)',
        "each epoch is cut anew",
    ),
    gamma_and_lambda_swapped=(
        "mask, gamma=ppo.gamma, lam=ppo.lam)",
        "mask, gamma=ppo.lam, lam=ppo.gamma)",
        "two numbers, one place each",
    ),
    kl_left_out=(
        "mask, kl.coef, kl=divergence)",
        "mask, kl.coef, kl=torch.zeros_like(divergence))",
        "KL is in the reward of each token",
    ),
    kl_coef_of_config=(
        "mask, kl.coef, kl=divergence)",
        "mask, ppo.kl_coef, kl=divergence)",
        "the coefficient is steered",
    ),
    kl_steered_by_one=(
        'kl.update(metrics["kl/ref"], rollout.size)',
        'kl.update(metrics["kl/ref"], 1)',
        "the horizon is in responses",
    ),
    ppo_clip_high_ignored=(
        "            clip_high=ppo.clip_high,",
        "            clip_high=None,",
        "ppo.clip_high has an effect",
    ),
    ppo_dual_clip_ignored=(
        "            dual_clip=ppo.dual_clip,",
        "            dual_clip=None,",
        "ppo.dual_clip has an effect",
    ),
    ppo_value_clip_ignored=(
        "            value_clip=ppo.value_clip,",
        "            value_clip=None,",
        "ppo.value_clip has an effect",
    ),
    ppo_scale_ignored=(
        "scores = self.sampler.score(rollout)",
        "self.sampler.score(rollout)\n        scores = rollout.scores",
        "reward.normalise has an effect",
    ),
)

GRPO = of(
    "methods/grpo",
    "methods/grpo",
    grpo_temperature_1=(
        "temperature = self.cfg.rollout.temperature",
        "temperature = 1.0",
        "the update is at the temperature of the draws",
    ),
    grpo_share=(
        "loss = loss * share",
        "loss = loss * 1.0",
        "tokens of advantage 0 count in the mean",
    ),
    even_by_normalised=(
        "earned = rollout.scores.view(-1, size)",
        "earned = scores.view(-1, size)",
        "groups are even by what they earned",
        "a group is of one task, and on its scale equal scores stay equal and others apart",
    ),
    kl_of_even_answers=(
        "if self.section.kl_coef or advantages[j] != 0",
        "if advantages[j] != 0",
        "with KL every answer is trained",
    ),
    groups_torn=(
        "[j for g in shuffled for j in batch.groups[g]]",
        "[group[k] for k in range(self.samples) for group in\n"
        "                (batch.groups[g] for g in shuffled)]",
        "the answers to a prompt are one run of its tokens",
    ),
    grpo_clip_high_ignored=(
        "            clip_high=grpo.clip_high,",
        "            clip_high=None,",
        "grpo.clip_high has an effect",
    ),
    drop_even_ignored=(
        "if not (even[g] and grpo.drop_even)",
        "if not even[g]",
        "grpo.drop_even has an effect",
    ),
)

SFT = of(
    "methods/sft",
    "methods/sft",
    sft_mean_over_rows=(
        "rows, count = range(len(batch.examples)), float(sum(map(len, batch.answers)))",
        "rows, count = range(len(batch.examples)), float(len(batch.answers))",
        "the loss is a mean over tokens",
    ),
    sft_cut_by_length=(
        "prefixes.common(fit.ids, whole)",
        "len(fit.ids)",
        "a token may reach across the end of the prompt",
    ),
    sft_first_token=(
        'start = 1 if cfg.sft.loss == "all"',
        'start = 2 if cfg.sft.loss == "all"',
        "sft.loss=all learns every token but the first",
    ),
)

UPDATES = of(
    "methods/minibatch",
    "methods/minibatch",
    "methods/ppo::test_a_mean_ratio_over_the_limit_is_skipped",
    "methods/ppo::test_the_gradient_is_clipped_and_its_norm_logged_before",
    oom_keeps_gradients=(
        "            self.optimizer.zero_grad(set_to_none=True)\n            budget",
        "            budget",
        "the parts before would count twice",
    ),
    tokens_of_the_last=(
        "need = own + len(rows.answers[j]) - 1",
        "need = own + len(rows.answers[j])",
        "an answer's last token is not run",
    ),
    shared_prefix_on_plain_rows=(
        "prefix = prefix if shared else 0",
        "prefix = prefix",
        "padded rows share nothing",
    ),
    largest_summed=(
        "max(old, value) if name in LARGEST",
        "old + value if name in LARGEST",
        "not a sum",
    ),
    gradients_kept=(
        "        self.optimizer.zero_grad(set_to_none=True)\n        return",
        "        return",
        "a minibatch starts without a gradient",
    ),
    target_kl_once=(
        "> 1.5 * limit",
        "> 1e9 * limit",
        "ppo.target_kl ends the epochs",
    ),
    target_kl_half_more=("> 1.5 * limit", "> limit", "the limit is half as much again"),
    max_ratio_ignored=(
        "bool(limits.max_ratio and metrics",
        "bool(False and metrics",
        "ppo.max_ratio has an effect",
    ),
    nothing_clipped=(
        "clip_gradients(trained, self.max_grad_norm)",
        "clip_gradients(trained, 0.0)",
        "optim.max_grad_norm has an effect",
    ),
    bad_gradient_taken=(
        "finite = math.isfinite(norm) and math.isfinite",
        "finite = math.isfinite",
        "a gradient that is not finite destroys the weights",
    ),
    bad_loss_taken=(
        'math.isfinite(norm) and math.isfinite(self.metrics["loss"])',
        "math.isfinite(norm)",
        "a loss that is not finite is no step",
    ),
)

REPORT = of(
    "methods/report",
    "methods/ppo::test_check_first_ratio_bounds",
    "methods/ppo::test_the_first_ratio_is_told_once_of_each_pass",
    "methods/ppo::test_a_loss_that_is_not_finite_moves_nothing",
    ratio_bound=("if gap > 1e-3:", "if gap > 1e-1:", "passes that differ end the run"),
    told_of_each_step=(
        "or self.checked:",
        "or False:",
        "one look is enough for each pass",
    ),
    bad_rows_are_not_those=(
        "for j in index], metrics)",
        "for j in index[1:]], metrics)",
        "the rows of the minibatch are written down",
    ),
)

PROMPTS = of(
    "methods/prompts",
    "methods/prompts",
    room_for_the_answer=(
        "limit = policy.context - room",
        "limit = policy.context",
        "the answer needs room too",
    ),
)
REFERENCE = of(
    "methods/reference_cache",
    "methods/reference_cache::test_only_what_is_new_is_run",
    "methods/reference_cache::test_prompt_and_answer_are_told_apart",
    "methods/reference_cache::test_the_oldest_are_given_up",
    "methods/reference_cache::test_the_state_comes_back_to_the_last_bit",
    "methods/rollout",
    cache_with_lora=(
        "        with lora_disabled(policy.model):",
        "        if True:",
        "the reference is the model without LoRA",
    ),
    cache_temperature_1=(
        "                [used[prompt_of[j]] for j in new.values()],\n                temperature,",
        "                [used[prompt_of[j]] for j in new.values()],\n                1.0,",
        "the reference is at the temperature of the draws",
    ),
    cache_key_runs_together=(
        'whole.update(b"/" + array',
        "whole.update(array",
        "a prompt's end is no answer's start",
    ),
    cache_newest_given_up=(
        "list(self.kept)[: max(len(self.kept) - self.limit, 0)]",
        "list(self.kept)[self.limit :]",
        "the oldest are given up",
    ),
    cache_state_from_the_start=(
        "            start += length",
        "            start += 0",
        "rows lie end to end",
    ),
)

# ---- decoding -------------------------------------------------------------------------------

GENERATE = of(
    "model/generate",
    "model/generate",
    draws_of_other_rows=(
        "alive[index], token[index]",
        "alive[: len(going)], token[index]",
        "a row keeps its draws when others leave",
    ),
    tokens_of_other_rows=(
        "alive[index], token[index]",
        "alive[index], token[: len(going)]",
        "a row keeps its token when others leave",
    ),
    cache_of_other_rows=(
        "cache.keep(going)",
        "cache.keep(range(len(going)))",
        "a row keeps its keys when others leave",
    ),
    positions_of_other_rows=(
        "position = position[index]",
        "position = position[: len(going)]",
        "a row keeps its position when others leave",
    ),
    positions_stand_still=(
        "        position = position + 1",
        "        position = position",
        "each token is one further",
    ),
    block_search_left=(
        "aim, right=True).clamp_(max=blocks - 1)",
        "aim).clamp_(max=blocks - 1)",
        "on a tie the next block begins",
    ),
    token_search_left=(
        "* scale, right=True)",
        "* scale)",
        "on a tie the next token begins",
    ),
    temperature_upside_down=(
        "logits = logits / sampling.temperature",
        "logits = logits * sampling.temperature",
        "a high temperature flattens",
    ),
    top_p_too_few=(
        "before = ordered.cumsum(-1) - ordered",
        "before = ordered.cumsum(-1)",
        "the token that crosses top_p is kept",
    ),
    top_p_of_one=(
        "before >= sampling.top_p * ordered.sum(-1, keepdim=True)",
        "before >= sampling.top_p",
        "weights do not sum to 1",
    ),
    top_k_ties=(
        "weights < kth",
        "weights <= kth",
        "the k-th is kept",
    ),
    states_of_counted=(
        "self.size += len(logprob)",
        "self.size += len(counted)",
        "rows that are over lie between",
    ),
    stop_a_token_late=(
        "policy.stop.ended([answers[batch[i]] for i in going])",
        "policy.stop.ended([answers[batch[i]][:-1] or [0] for i in going])",
        "the token that ends an answer is its last",
    ),
    samples_interleaved=(
        "prompt_of = [p for p in range(len(prompts)) for _ in range(sampling.samples)]",
        "prompt_of = [p for _ in range(sampling.samples) for p in range(len(prompts))]",
        "the answers to a prompt lie side by side",
    ),
    last_of_weight=(
        "torch.minimum(token, last)",
        "token",
        "a token without weight is never drawn",
    ),
)

KEPT_GRAPH = of(
    "model/generate",
    "methods/ppo::test_a_pass_that_is_too_long_or_of_few_prompts_is_not_reused",
    graph_without_answers=(
        "graph = keep_graph - rows * (longest - 1)",
        "graph = keep_graph",
        "answers stand behind the prompts in one pass",
    ),
)

# ---- the tree -------------------------------------------------------------------------------

PACK = of(
    "tree/pack",
    "tree/pack",
    "tree/passes",
    tail_position=(
        "branches.suffixes[p] = row.add(tokens, cuts[p])",
        "branches.suffixes[p] = row.add(tokens, 0)",
        "rotary positions behind a prefix",
    ),
    ends_one_late=(
        "len(prompt) - cuts[p] - 1 for p",
        "len(prompt) - cuts[p] for p",
        "an answer is predicted from its prompt's last token",
    ),
    prompt_pass_rows=(
        "[count + start for start in starts]",
        "[start for start in starts]",
        "answers' states stand behind the prompts' ends",
    ),
) + of(
    "tree/pack",
    "tree/plain",
    plain_positions=(
        "cumsum(1).sub_(1).clamp_(min=0)",
        "cumsum(1).clamp_(min=0)",
        "the first position is 0",
    ),
)

ROW = of(
    "tree/packed_row",
    "tree/pack",
    "tree/passes",
    answer_position=(
        "starts[j] = self.add(answers[j][:-1], position)[0]",
        "starts[j] = self.add(answers[j][:-1], position + 1)[0]",
        "rotary positions of answers",
    ),
)

PREFIXES = of(
    "tree/prefixes",
    "tree/prefixes",
    "tree/passes",
    whole_prompt_shared=(
        "(len(prompts[i]) - 1 for i in members)",
        "(len(prompts[i]) for i in members)",
        "a prompt keeps a token of its own",
    ),
    prefix_of_a_whole_prompt=(
        "len(p) > size and",
        "len(p) >= size and",
        "a prompt goes on behind a prefix",
    ),
)

PLAIN = of(
    "tree/plain",
    "tree/plain",
    "model/generate",
    padding_seen=(
        "attention_mask=mask.long(),",
        "attention_mask=torch.ones_like(mask).long(),",
        "padding is not attended to",
    ),
    plain_mask_of_other_rows=(
        "select(self.cache, rows), self.mask[rows]",
        "select(self.cache, rows), self.mask[: len(rows)]",
        "a row keeps its padding when others leave",
    ),
)

PLAN = of(
    "tree/plan",
    "tree/attention",
    "tree/passes",
    ancestors_causal=(
        "slice(first, first + count), causal=keys is None",
        "slice(first, first + count), causal=True",
        "ancestors are seen whole",
    ),
    padded_keys_seen=(
        "if not bool(seen.all()):",
        "if False:",
        "padding of keys is not attended to",
    ),
)

ATTENTION = of(
    "tree/attention",
    "tree/attention",
    "tree/passes",
    heads_in_turns=(
        "x.repeat_interleave(groups, dim=1)",
        "x.repeat(1, groups, 1)",
        "neighbouring query heads share keys",
    ),
    head_gradients_in_turns=(
        "torch.sum(grad.unflatten(1, (fewer.shape[1], -1)), 2,",
        "torch.sum(grad.unflatten(1, (-1, fewer.shape[1])), 1,",
        "neighbouring query heads share keys",
    ),
    padded_queries_count=(
        "norm = norm.masked_fill(part.padded, math.inf)",
        "norm = norm",
        "padding of queries has no gradient",
    ),
    merged_upside_down=(
        "share = torch.sigmoid(norm - lse)",
        "share = torch.sigmoid(lse - norm)",
        "the part with more weight has the larger share",
    ),
    merged_norm=(
        "torch.logaddexp(lse, norm, out=lse)",
        "torch.maximum(lse, norm, out=lse)",
        "the norm of two parts is that of both",
    ),
    past_values=(
        "_add(sum_v, part.keys, _flat(gv))",
        "_add(sum_v, part.keys, _flat(gk))",
        "the gradient of values",
    ),
    sees_one_ahead=(".triu_(1)", ".triu_(2)", "no token sees the next"),
    softmax_gradient=(
        "weights * (d_weights - inner) * scale",
        "weights * d_weights * scale",
        "weights sum to 1",
    ),
)

PASSES = (
    of(
        "tree/interface",
        "tree/interface",
        window_ignored=(
            "if window and window < longest:",
            "if False:",
            "the tree knows no window",
        ),
        pass_left_behind=(
            "            setattr(config, HELD_AS, before)",
            "            pass",
            "a pass inside of a pass leaves the outer one",
        ),
    )
    + of(
        "tree/checkpointing",
        "tree/checkpointing",
        run_again_in_another_pass=(
            "with switched_on(config, running):",
            "with switched_on(config, pass_of(config)):",
            "a block is run again in its own pass",
        ),
    )
    + of(
        "tree/trim",
        "tree/trim",
        all_tokens_for_ever=(
            "            each.off = False",
            "            pass",
            "the last block is trimmed again",
        ),
    )
    + of(
        "tree/cache",
        "model/generate",
        decode_heads_in_turns=(
            "further queries\n                asked = q.unflatten(1, (k.shape[1], groups))",
            "these\n                asked = q.unflatten(1, (groups, k.shape[1])).transpose(1, 2)",
            "neighbouring query heads share keys",
        ),
        buffer_stands_still=(
            "            self.used += 1",
            "            self.used += 0",
            "each token has its place",
        ),
        members_of_other_rows=(
            "[new_row[r] for r in rows if r in new_row]",
            "[r for r in rows if r < len(new_row)]",
            "a row keeps its prefix when others leave",
        ),
        bias_of_other_rows=(
            "self.bias = self.bias.index_select(0, index)",
            "self.bias = self.bias[: len(index)]",
            "a row keeps its padding when others leave",
        ),
    )
    + of(
        "tree/cache",
        "tree/cache",
        static_place_hidden=(
            "self.bias.index_fill_(3, self.slot, 0.0)",
            "pass",
            "a token sees itself",
        ),
    )
)

# ---- LoRA, log-probabilities, operations ----------------------------------------------------

TORCH_LORA = of(
    "ops/torch_lora",
    "ops/ops",
    dropout_factor=(
        "tuple(s / (1.0 - dropout_p) for s in scalings)",
        "tuple(scalings)",
        "dropout keeps the expectation",
    ),
    dropout_of_x_gradient=(
        "grad_x.addcmul_(low_grad @ lora_a, mask)",
        "grad_x.addmm_(low_grad, lora_a)",
        "what was dropped has no gradient",
    ),
    dropout_of_a_gradient=(
        "grad_as = low_grad.t() @ dropped",
        "grad_as = low_grad.t() @ x.reshape(dropped.shape)",
        "what was dropped teaches nothing",
    ),
    gradient_scale=(
        ".mul_(ctx.factors[i]) for i, dy",
        ".mul_(1.0) for i, dy",
        "the scale is in the gradient",
    ),
    dropout_seed=(
        ".manual_seed(seed)",
        ".manual_seed(0)",
        "each seed is another mask",
    ),
)

SOFTMAX = of(
    "ops/torch_softmax",
    "ops/ops",
    sums_not_rescaled=(
        "self.others * scale + exp.sum(1)",
        "self.others + exp.sum(1)",
        "the maximum has moved",
    ),
    entropy_not_shifted=(
        "(self.weighted + shift * self.others) * scale",
        "self.weighted * scale",
        "the maximum has moved",
    ),
    entropy_gradient_sign=(
        "mul_(-grad_entropy[:, None])",
        "mul_(grad_entropy[:, None])",
        "the entropy's gradient",
    ),
    target_of_the_first_block=(
        "column = targets - start",
        "column = targets",
        "blocks start elsewhere",
    ),
)

LOGPROBS = of(
    "ops/torch_logprobs",
    "ops/ops",
    direction_temperature=(
        "pulled.mul_(1.0 / head.temperature)",
        "pulled",
        "the gradient is over τ",
    ),
    block_temperature=(
        "*own, p).mul_(1.0 / head.temperature)",
        "*own, p)",
        "the gradient is over τ",
    ),
)

LORA = of(
    "model/lora",
    "model/lora",
    rslora_ignored=(
        "alpha / math.sqrt(r) if rslora else alpha / r",
        "alpha / r",
        "lora.rslora has an effect",
    ),
    reference_moves=(
        "layer.ref_b = layer.lora_b.detach().clone()",
        "layer.ref_b = layer.lora_b.detach()",
        "a frozen reference stays where it was",
    ),
    reference_dropped=(
        "self.ref_a, self.ref_b, 0.0",
        "self.ref_a, self.ref_b, dropout_p",
        "the reference has no dropout",
    ),
    dropout_in_eval=(
        "dropout_p = self.dropout_p if self.training else 0.0",
        "dropout_p = self.dropout_p",
        "no dropout outside of training",
    ),
    flag_not_restored=(
        "            setattr(layer, flag, value)",
        "            setattr(layer, flag, False)",
        "regions may be nested",
    ),
    base_with_reference=(
        "layer.ref_a = layer.ref_b = None",
        "layer.ref_b = None if layer.ref_a is None else layer.ref_b",
        "the base has no adapter at all",
    ),
    reference_lost=(
        "layer.ref_a, layer.ref_b = ref_a, ref_b",
        "pass",
        "the reference is back behind the base",
    ),
)

OPS = of(
    "ops/__init__",
    "ops/ppo_loss",
    "methods/ppo::test_the_loss_of_a_batch_against_loops",
    "ops/ops::test_linear_logprobs_is_its_formula_with_gradients",
    ops_entropy_lost=(
        "ppo_loss_form(logprobs)(logprobs=logprobs, **given)",
        'ppo_loss_form(logprobs)(logprobs=logprobs, **{**given, "entropy_coef": 0.0})',
        "the bonus has an effect",
    ),
    ops_temperature=(
        '"temperature": float(temperature),',
        '"temperature": 1.0,',
        "log-probs are at the temperature",
    ),
)

MODEL = of(
    "model/policy",
    "model/model",
    "methods/ppo::test_detach_value_keeps_the_value_loss_out_of_lora",
    value_not_detached=(
        "hidden.detach() if self.detach_value else hidden",
        "hidden",
        "model.detach_value has an effect",
    ),
)

STOP = of(
    "model/stop",
    "model/model",
    eos_does_not_stop=(
        "row[-1] in self.eos or STOP in",
        "STOP in",
        "an eos ends an answer",
    ),
)

PATH_CHECK = of(
    "model/path_check",
    "model/path_check",
    "model/model",
    path_bound=(
        "<= EXACT * max(",
        "<= 1e4 * EXACT * max(",
        "a path that is a little off is not taken",
    ),
    rough_path_bound=("<= ROUGH**2 *", "<= 81 * ROUGH**2 *", "a path that is far off is not taken"),
    path_not_decoded=(
        "for run in (_in_one_pass, _decoded)",
        "for run in (_in_one_pass, _in_one_pass)",
        "decoding is checked too",
    ),
)

# ---- answers, rewards, optimizer, checkpoints -----------------------------------------------

ANSWERS = of(
    "tasks/answers",
    "tasks/language",
    answer_without_tag=(
        "    if not tag:",
        "    if False:",
        "an answer is closed by the tag",
    ),
    several_answers=(
        "found.pop() if len(found) == 1",
        "sorted(found)[0] if found",
        "two answers are none",
    ),
    last_tag=(
        "response.partition(STOP)",
        "response.rpartition(STOP)",
        "what stands behind the first tag does not count",
    ),
)

REWARDS = of(
    "tasks/rewards",
    "tasks/language",
    reward_half=(
        "(spec.rating.high - spec.rating.low) / 2",
        "spec.rating.high / 1.0",
        "half of the range",
    ),
    no_answer_is_wrong=(
        "        return exceptional\n    return right",
        "        return wrong\n    return right",
        "no answer is less than a wrong one",
    ),
    running_squares=(
        "squares + gap * (value - mean)",
        "squares + gap * gap",
        "Welford's sum of squares",
    ),
)

OPTIM = of(
    "runtime/optim",
    "runtime/optim",
    clip_scales_up=(
        ".clamp(max=1.0), 1.0)",
        ", 1.0)",
        "small gradients are left as they are",
    ),
    warm_up_from_zero=(
        "return (step + 1) / warmup_steps",
        "return step / warmup_steps",
        "the first step moves too",
    ),
    schedule_end=(
        "max(total_steps - 1 - warmup_steps, 1)",
        "max(total_steps - warmup_steps, 1)",
        "the last step is the end of the schedule",
    ),
    value_lr_ignored=(
        "value_lr = cfg.lr if cfg.value_lr is None else cfg.value_lr",
        "value_lr = cfg.lr",
        "optim.value_lr has an effect",
    ),
    norm_of_each=(
        "for grad in grads:\n            grad.mul_(factor",
        "for grad in grads[:1]:\n            grad.mul_(factor",
        "all gradients are scaled together",
    ),
)

SCORED = of(
    "answering/by_policy",
    "answering/by_policy::test_labels_of_different_lengths_are_scored_as_asked",
    "answering/by_policy::test_the_prior_is_run_once_for_a_task_and_its_number_of_shots",
    mean_over_padding=(
        "scores / mask.sum(-1)",
        "scores / mask.shape[-1]",
        "the mean is over a label's own tokens",
    ),
    prior_of_other_shots=(
        "self._priors[spec.name, prompt.dropped] for",
        "self._priors[spec.name, prompts[0].dropped] for",
        "a prompt that lost shots is compared with one that has as many",
    ),
    prior_run_each_batch=(
        "if (spec.name, dropped) not in self._priors:",
        "if True:",
        "the prior is run once",
    ),
)

CHECKPOINT = of(
    "runtime/checkpoint",
    "runtime/checkpoint::test_latest_goes_by_number_and_prune_keeps_the_last_and_the_best",
    "runtime/checkpoint::test_best_is_replaced_only_by_a_better_metric",
    "runtime/checkpoint::test_a_spoilt_checkpoint_is_one_line",
    "runtime/checkpoint::test_any_changed_byte_is_noticed",
    best_is_newest=(
        "metric <= stored",
        "metric < stored",
        "of equal checkpoints the first one stays",
    ),
    best_of_nan=(
        "math.isnan(metric) or ",
        "",
        "NaN is never the best",
    ),
    latest_is_first=("steps[-1] if steps", "steps[0] if steps", "the highest step is the latest"),
    damage_unseen=(
        "if hashlib.sha256(data).hexdigest() != sha256:",
        "if False:",
        "a flipped bit is noticed",
    ),
    none_kept=("[: -max(keep, 1)]", "[: -keep]", "one checkpoint always stays, and no more"),
)

BASELINES = of(
    "answering/baselines",
    "answering/baselines",
    baselines_constant_of_held_rows=(
        "Counter(row.label for row in train)",
        "Counter(row.label for row in held)",
        "the largest class is that of training",
    ),
    baselines_end_the_run=(
        "except Exception as error:",
        "except KeyError as error:",
        "a baseline never ends a run",
    ),
)

WARNINGS = of(
    "answering/warn",
    "answering/warn",
    warn_of_absent_classes=(
        "if count and not report",
        "if not report",
        "a class without rows is not missed",
    ),
    warn_of_skewed_data=(
        "given > 0.5 and given - gold > EXCESS",
        "given > 0.5",
        "answers as skewed as the labels are no fault",
    ),
)

MUTANTS = [
    *LOSSES, *ADVANTAGES, *ROLLOUT, *PROMPTS, *PPO, *GRPO, *SFT, *UPDATES, *REPORT, *REFERENCE,
    *GENERATE,
    *KEPT_GRAPH, *PACK, *ROW, *PREFIXES, *PLAIN, *PLAN, *ATTENTION, *PASSES, *TORCH_LORA, *SOFTMAX,
    *LOGPROBS, *SCORED,
    *LORA, *OPS, *MODEL, *STOP, *PATH_CHECK, *ANSWERS, *REWARDS, *OPTIM, *CHECKPOINT,
    *BASELINES, *WARNINGS,
]  # fmt: skip
