"""PPO on SST-2 (arXiv 2410.11020) for a Llama-like model, by default on made-up film reviews.
python -m ppo_nlu.examples.ppo_loop [MODEL_FOLDER [TSV]], a TSV such as GLUE's SST-2/train.tsv."""

import re
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ppo_nlu.losses import masked_whiten, policy_loss, shaped_rewards, value_loss
from ppo_nlu.ops import gae, linear_logprobs, lora_linear

ASSETS = Path(__file__).parents[1] / "assets"
B, R, MINIBATCH, EPOCHS, LR, KL_COEF, TEMPERATURE = 32, 8, 16, 4, 3e-4, 0.02, 1.0
SAMPLING = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": R}
WORDS, ANSWER = ("Negative", "Positive"), re.compile(r"\s*(Negative|Positive)\s*</Judgement>")
PROMPT = """<Judgement> {Insert only Positive or Negative here} </Judgement>
Prompt:\nNow judge the opinion of the sentence "%s".\nAssistant:\n<Judgement>"""


def add_lora(base, model, rank=32):
    """Adds s·BA to a frozen layer; s is `model.scale`, and with 0 the model is the reference."""
    base.a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
    base.b = nn.Parameter(torch.zeros(base.out_features, rank))
    base.forward = lambda x: lora_linear(x, base.weight, base.bias, base.a, base.b, model.scale)


def measure(model, tokens, attention, scale=2.0):
    """log π(aₜ|sₜ) at the sampling temperature and V(sₜ), (B, R), of left-padded tokens (B, T)."""
    model.scale = scale
    states = model.model(tokens, attention, attention.cumsum(1) - 1)[0][:, -R - 1 : -1]  # (B, R, H)
    drawn = states.flatten(0, 1), model.lm_head.weight, tokens[:, -R:].flatten(), None, TEMPERATURE
    return linear_logprobs(*drawn)[0].view(-1, R), states @ model.critic


def ppo(folder=ASSETS / "tiny", tsv=ASSETS / "examples/reviews.tsv", steps=60):
    """Trains, and yields the mean score of each step's answers."""
    rows = [line.rsplit(maxsplit=1) for line in tsv.read_text("utf-8").strip().split("\n")[1:]]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # no dropout
    model.requires_grad_(False).generation_config = GenerationConfig(**SAMPLING)
    for layer in [m for m in model.model.modules() if isinstance(m, nn.Linear)]:
        add_lora(layer, model)
    model.scale, model.critic = 2.0, nn.Parameter(torch.zeros(model.config.hidden_size))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR)
    for _ in range(steps):
        # 1. Sample an answer to each prompt; the token that completes the stop is its last.
        batch = [rows[i] for i in torch.randperm(len(rows))[:B].tolist()]
        prompts = tokenizer([PROMPT % s for s, _ in batch], padding=True, return_tensors="pt")
        tokens = model.generate(prompts["input_ids"], attention_mask=prompts["attention_mask"])
        attention = nn.functional.pad(prompts["attention_mask"], (0, R), value=1)  # (B, T)
        begun = [tokenizer.batch_decode(tokens[:, -R:][:, :t]) for t in range(R + 1)]
        mask = torch.tensor([["</Judgement>" not in x for x in texts] for texts in begun[:R]]).T
        # 2. Score it: right 1, wrong 0, no answer -1.
        said = zip(map(ANSWER.match, begun[R]), batch, strict=True)
        scores = torch.tensor([float(m[1] == WORDS[int(y)]) if m else -1.0 for m, (_, y) in said])
        with torch.no_grad():  # 3. Log-probs and values before the update, and the reference's.
            old_logprobs, old_values = measure(model, tokens, attention)
            ref_logprobs, _ = measure(model, tokens, attention, scale=0.0)
        rewards = shaped_rewards(scores, old_logprobs, ref_logprobs, mask, KL_COEF)  # 4. With KL.
        advantages, returns = gae(rewards, old_values, mask)  # 5. Better than the critic expected?
        advantages = masked_whiten(advantages, mask)
        for _ in range(EPOCHS):  # 6. Minibatches, each an optimizer step.
            for i in torch.randperm(B).split(MINIBATCH):
                logprobs, values = measure(model, tokens[i], attention[i])
                loss, _ = policy_loss(logprobs, old_logprobs[i], advantages[i], mask[i])
                critic_loss, _ = value_loss(values, old_values[i], returns[i], mask[i])
                optimizer.zero_grad()
                (loss + 0.1 * critic_loss).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        yield scores.mean().item()


if __name__ == "__main__":
    for step, reward in enumerate(ppo(*map(Path, sys.argv[1:])), start=1):
        print(f"step {step}, reward {reward:.3f}", flush=True)
