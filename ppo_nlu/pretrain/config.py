"""The settings of a run that makes a tiny model: `section.key`, as a YAML file states them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppo_nlu.config.fields import below_one, number, one_of, positive, share


@dataclass(frozen=True)
class TextConfig:
    """Where the texts are, and how often the film text is shown."""

    path: str | None = None  # the folder above glue/; null: $PPO_NLU_DATA
    sentence_passes: int = number(3, min=0)
    phrase_passes: int = number(1, min=0)
    phrase_min_words: int = number(4, min=1)


@dataclass(frozen=True)
class SeenConfig:
    """Which shares of the sentences of SST-2 train may be seen with labels."""

    train_share: float = share(0.45)  # to train on
    heldout_share: float = share(0.06)  # to stop by


@dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece model."""

    vocab_size: int = number(8000, min=300)
    film_weight: int = positive(2)  # how often film text is counted
    form_weight: int = positive(400)  # how often the lines of the form are counted


@dataclass(frozen=True)
class ArchitectureConfig:
    """The Llama architecture."""

    hidden: int = positive(256)
    layers: int = positive(2)
    heads: int = positive(4)
    ffn: int = positive(704)
    context: int = positive(2048)
    rope_theta: float = positive(10000.0)


@dataclass(frozen=True)
class PretrainConfig:
    """Causal pretraining on packed rows."""

    length: int = number(256, min=2)
    batch_size: int = positive(16)
    lr: float = positive(2e-3)
    warmup: float = share(0.03)
    weight_decay: float = number(0.1, min=0)
    max_tokens: int = number(0, min=0)  # 0: all
    matmul_precision: str = one_of("medium", "highest", "high", "medium")  # of products in training


@dataclass(frozen=True)
class RecallConfig:
    """Self-supervised: behind the form, name the words of the text. No label is read."""

    steps: int = positive(1200)
    batch_size: int = number(64, min=2)
    lr: float = positive(2e-3)
    warmup: float = share(0.03)
    weight_decay: float = number(0.1, min=0)
    rare: float = positive(1e-3)  # a word of frequency p counts rare / (rare + p)


@dataclass(frozen=True)
class RatingConfig:
    """Rated reviews: the seen sentences and phrases with the words favourable and unfavourable."""

    steps: int = positive(800)
    batch_size: int = number(64, min=2)
    lr: float = positive(5e-4)
    warmup: float = share(0.05)
    weight_decay: float = number(0.1, min=0)
    min_words: int = number(4, min=1)  # shorter phrases are left out
    drop: float = below_one(0.2)  # share of the words left out at random, against learning by heart


@dataclass(frozen=True)
class InstructConfig:
    """The instruction stage: loss on the answers alone, stopped on held-out sentences."""

    lr: float = positive(1e-3)
    batch_size: int = number(32, min=2)
    max_steps: int = positive(1500)
    warmup: float = share(0.02)
    weight_decay: float = number(0.1, min=0)
    sst2_share: float = share(0.75)  # of the steps
    neutral_share: float = share(0.0)  # of the steps
    rating_share: float = share(0.0)  # of the steps; what is left are other tasks
    rows_per_task: int = number(4000, min=0)  # of the other tasks
    stop_at: float = share(0.61)  # mean probability of the right answer on the held-out sentences
    check_every: int = positive(20)


@dataclass(frozen=True)
class ScoreConfig:
    """The scores on the model card."""

    batch_size: int = positive(64)
    max_new_tokens: int = positive(8)
    samples: int = positive(5)  # sampled runs over all rows


@dataclass(frozen=True)
class TinyConfig:
    """One tiny model."""

    task: str = one_of("sst2", "sst2")
    seed: int = number(0, min=0)
    output: str = "runs/tiny"
    data: TextConfig = field(default_factory=TextConfig)
    seen: SeenConfig = field(default_factory=SeenConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    rating: RatingConfig = field(default_factory=RatingConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    eval: ScoreConfig = field(default_factory=ScoreConfig)
