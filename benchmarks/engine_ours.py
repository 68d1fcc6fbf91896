"""Our side of `engines.py`: a cell, run by the classes that training uses, and the start-up."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.engine_job import (
    ADAM,
    EPOCHS,
    KL,
    LORA,
    ROOT,
    Job,
    Meter,
    bundled_tokenizer,
    load_tokenizer_classes,
    random_model,
)


def ours(job: Job, meter: Meter) -> None:
    """PPO, GRPO or SFT of ours, run by the classes that training uses."""
    from ppo_nlu.config import load_config
    from ppo_nlu.methods.registry import METHODS
    from ppo_nlu.model import load as models
    from ppo_nlu.runtime import flops, profiling
    from ppo_nlu.tasks import Example, get_task

    load_tokenizer_classes()
    meter.imported()
    config = Path(job["out"]).with_suffix(".yaml")
    names = list(dict.fromkeys(row["task"] for row in job["rows"]))
    config.write_text(f"task: {names[0]}\n")
    cfg = load_config(config, our_settings(job))
    specs = {name: get_task(name) for name in names}
    if job["reward"] == "noise":
        path = "benchmarks.engine_job:noise"
        specs = {name: replace(spec, reward=path) for name, spec in specs.items()}
    if job.get("shape"):
        load = models.load_base
        models.load_base = lambda c: (
            random_model(job).eval().requires_grad_(False),
            bundled_tokenizer(),
        )
        method = METHODS[cfg.method](cfg, specs)
        models.load_base = load
    else:
        method = METHODS[cfg.method](cfg, specs)
    policy: Any = method.model
    if job["task"] == "synthetic":
        ids = {row["text"]: row["ids"] for row in job["rows"]}
        tokenise = policy.encode
        policy.encode = lambda text: ids[text] if text in ids else tokenise(text)
    for row in job["rows"][:8]:
        assert policy.encode(row["text"]) == row["ids"], "prompts differ from the rivals'"
    if job["stop"] == "equal" and cfg.method != "sft":
        policy.stop.eos.clear()
        policy.stop.may_end.zero_()
    if job["variant"] == "all-logits":
        all_logits(policy)
    trained = [p for group in method.parameters() for p in group]
    examples = [
        Example(id=r["id"], fields=r["fields"], label=r["label"], task=r["task"])
        for r in job["rows"]
    ]
    size, steps, lengths = job["prompts"], 2 * job["steps"], []
    passes: list[int] = []
    profile = None
    if job.get("profile"):
        profile = profiling.Profile(steps, meter.device, weights=flops.weights_of(policy))
    with profile or nullcontext():
        meter.mark()
        for step in range(steps):
            counted = CountPasses(policy, passes) if step == steps - 1 else nullcontext()
            with counted:
                batch = examples[step * size : (step + 1) * size]
                metrics = method.update(method.collect(batch, step), step).metrics
            meter.mark()
            lengths.append(metrics.get("answer/tokens", 0.0))
            if "reward/mean" in metrics:
                meter.rewards.append(metrics["reward/mean"])
    if job["stop"] == "equal" and cfg.method != "sft":
        assert set(lengths) == {float(job["tokens"])}, f"answers of {lengths} tokens"
    if profile is not None:
        meter.more["phases"] = {name: row.seconds for name, row in profile.rows.items()}
    meter.more |= {
        "answer_tokens": sum(lengths) / len(lengths),
        "trained_weights": sum(p.numel() for p in trained),
        "token_passes": sum(passes) or "",
        "version": "",
    }


def our_settings(job: Job) -> list[str]:
    """The overrides that make our run the same as theirs."""
    answers = job["prompts"] * job["group"]
    common = [
        f"method={job['method']}", f"seed={job['seed']}", f"model.device={job['device']}",
        f"model.dtype={job['dtype']}", f"lora.r={LORA['r']}", f"lora.alpha={LORA['alpha']}",
        "optim.name=adamw", f"optim.lr={job['lr']}", "optim.schedule=constant", "optim.warmup=0",
        *(f"optim.{name}={value}" for name, value in ADAM.items()), "optim.max_grad_norm=1.0",
        f"rollout.max_new_tokens={job['tokens']}", f"rollout.batch_size={job['prompts']}",
        f"rollout.samples_per_prompt={job['group']}",
    ]  # fmt: skip
    if not job.get("shape"):
        common.append(f"model.name_or_path={job['model_folder']}")
    if job["method"] == "ppo":
        common += [
            f"ppo.epochs={EPOCHS}", f"ppo.minibatch_size={answers}", "ppo.kl_adaptive=false",
            f"ppo.kl_coef={KL}", "ppo.kl_estimator=k1", f"ppo.micro_batch_size={job['micro']}",
        ]  # fmt: skip
    elif job["method"] == "grpo":
        common += [f"grpo.kl_coef={KL}", "grpo.epochs=1", f"grpo.micro_batch_size={job['micro']}"]
    else:
        common += [f"sft.batch_size={job['prompts']}", f"sft.micro_batch_size={job['micro']}"]
    return [*common, *job["options"]]


class CountPasses:
    """Counts token passes in a region: one for each token of a forward, padding included, and one
    more for its backward (the gradient of the weights, which are frozen, is not asked for)."""

    def __init__(self, policy: Any, into: list[int]):
        self.policy, self.into = policy, into

    def __enter__(self) -> None:
        self.handle = self.policy.decoder.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        import torch

        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        self.into.append(ids.numel() * (1 + torch.is_grad_enabled()))

    def __exit__(self, *ignored: object) -> None:
        self.handle.remove()


def all_logits(policy: Any) -> None:
    """Run the LM head on every position of each scoring pass, forward and backward, as a causal LM
    does (generation asks for the last one only, there too). A rollout's pass over its prompts that
    is kept for the update, and so is run under autograd, counts as one. The states go through
    unchanged."""
    import torch

    weight = policy.head.weight

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any) -> Any:
            logits = hidden.detach() @ weight.detach().T
            ctx.save_for_backward(torch.log_softmax(logits, dim=-1))
            return hidden.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            (logprobs,) = ctx.saved_tensors
            return grad + 0.0 * (logprobs.exp() @ weight.detach())

    scoring = False
    hidden = policy.hidden

    def scored(*args: Any, **kwargs: Any) -> Any:
        nonlocal scoring
        scoring = True
        try:
            return hidden(*args, **kwargs)
        finally:
            scoring = False

    def hook(module: Any, args: Any, out: Any) -> Any:
        if scoring or torch.is_grad_enabled():
            out.last_hidden_state = Head.apply(out.last_hidden_state)
        return out

    policy.hidden = scored
    policy.decoder.register_forward_hook(hook)


# ---- start-up


class _Done(Exception):
    """The first optimizer step is over."""


def startup(job: Job, meter: Meter) -> None:
    """Seconds to the first optimizer step of `ppo_nlu.train`, imports of torch and transformers and
    the reading of the model left out; `phases` says where they went."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    load_tokenizer_classes()
    meter.imported()
    began, cpu = time.perf_counter(), time.process_time()
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from ppo_nlu import train
    from ppo_nlu.model import load as models

    spent = {"imports": time.perf_counter() - began}
    models.load_base = timed(models.load_base, "model", spent)
    train.start = timed(train.start, "start", spent)

    def stop(*ignored: Any) -> None:
        raise _Done

    register_optimizer_step_post_hook(stop)
    folder = Path(job["out"]).with_suffix("")
    data = [f"data.path={job['data']}"] if job["data"] else []
    with suppress(_Done):
        train.main([str(ROOT / "configs" / "sst2.yaml"), *data, "--output", str(folder)])
    whole, cpu = time.perf_counter() - began, time.process_time() - cpu
    spent["start"] -= spent["model"]  # data, LoRA layers, the check of the tree
    spent["step"] = whole - sum(spent.values())
    meter.more = {"first_step_s": whole - spent["model"], "version": ""}
    meter.more["phases"] = spent | {"cpu": cpu}


def timed(call: Callable[..., Any], name: str, into: dict[str, float]) -> Callable[..., Any]:
    """The call, adding its seconds up under `name`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            into[name] = into.get(name, 0.0) + time.perf_counter() - start

    return wrapped


RUN = {"ppo": ours, "grpo": ours, "sft": ours, "startup": startup}
