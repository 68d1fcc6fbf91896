"""The model card: measured values in the text of card.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppo_nlu.pretrain.config import TinyConfig
from ppo_nlu.pretrain.corpus import Corpus, seen_keys
from ppo_nlu.pretrain.lessons import Material

TEMPLATE = Path(__file__).with_name("card.md")


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.1f} %"


def score_table(facts: dict[str, Any]) -> str:
    """The zero-shot scores, dev and held-out."""
    names = ("sampled", "greedy", "score", "unparsed", "first_word_share")
    head = "| rows | n | one sample (T = 1) | greedy | label scoring | unparsed | says Positive |\n"
    lines = [head + "|---|---|---|---|---|---|---|"]
    for key, title in (("dev", "SST-2 dev"), ("heldout", "held-out sentences of SST-2 train")):
        cells = " | ".join(percent(facts[key][name]) for name in names)
        lines.append(f"| {title} | {facts[key]['rows']} | {cells} |")
    return "\n".join(lines)


def corpus_table(corpus: Corpus) -> str:
    """Every text source: texts, words, passes, dropped."""
    lines = ["| source | texts | words | passes | dropped |\n|---|---|---|---|---|"]
    for name, texts in corpus.texts.items():
        words = sum(len(text.split()) for text in texts)
        passes = corpus.passes.get(name, 1)
        lines.append(f"| {name} | {len(texts):,} | {words:,} | {passes} | {corpus.dropped[name]} |")
    return "\n".join(lines)


def model_card(
    cfg: TinyConfig, m: Material, facts: dict[str, Any], folder: Path, command: str
) -> str:
    """README.md beside the weights, from measured values."""
    taught, seen = facts["instruct"], m.split
    runs = facts["dev"]["sampled_runs"]
    values = {
        "megabytes": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "command": command,
        "layers": cfg.model.layers,
        "hidden": cfg.model.hidden,
        "heads": cfg.model.heads,
        "ffn": cfg.model.ffn,
        "context": f"{cfg.model.context:,}",
        "length": cfg.pretrain.length,
        "pieces": f"{cfg.tokenizer.vocab_size:,}",
        "scores": score_table(facts),
        "samples": cfg.eval.samples,
        "low": percent(min(runs)),
        "high": percent(max(runs)),
        "tokens": f"{facts['pretrain']['tokens']:,}",
        "loss": f"{facts['pretrain']['loss']:.2f}",
        "seconds": f"{facts['pretrain']['seconds']:,}",
        "recall_steps": cfg.recall.steps,
        "recall_batch": cfg.recall.batch_size,
        "excess": f"{facts['recall']['excess_loss']:.2f} nats",
        "rating_steps": cfg.rating.steps,
        "rating_batch": cfg.rating.batch_size,
        "rating_rows": f"{facts['rating']['rows']:,}",
        "rating_score": percent(facts["rating"]["heldout_score"]),
        "steps": taught["steps"],
        "batch": cfg.instruct.batch_size,
        "own": f"{taught['sst2_rows']:,}",
        "neutral": f"{taught['neutral_rows']:,}",
        "rated": f"{taught['rating_rows']:,}",
        "other": f"{taught['other_rows']:,}",
        "tasks": ", ".join(sorted(lesson.spec.title for lesson in m.others)) or "none",
        "stop_at": cfg.instruct.stop_at,
        "reached": f"{taught['heldout_expected']:.3f}",
        "corpus": corpus_table(m.corpus),
        "seen": f"{seen.excluded_rows:,}",
        "rows": f"{seen.total_rows:,}",
        "seen_share": percent(seen.excluded_rows / seen.total_rows),
        "distinct": f"{len(seen_keys(seen)):,}",
        "train_share": percent(cfg.seen.train_share),
        "heldout_share": percent(cfg.seen.heldout_share),
    }
    return TEMPLATE.read_text(encoding="utf-8").format_map(values)
