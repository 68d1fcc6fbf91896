"""The sections of a config: one frozen dataclass each, with every key, its default and its limits.

The comment at a key is its meaning; `tests.config_table` writes it into `configs/README.md`. null
means that a key is not set. 0 means "off" only where the comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ppo_nlu.config.fields import below_one, count, long_text, number, one_of, positive, share


@dataclass(frozen=True)
class ModelConfig:
    """The language model and the value head."""

    name_or_path: str = "bundled"  # "bundled", a folder, or a Hugging Face name
    dtype: str = one_of("float32", "float32", "bfloat16", "float16")  # precision of frozen weights
    device: str = "auto"  # auto, cpu, cuda or cuda:<number>
    attention: str = one_of("sdpa", "sdpa", "eager")  # attention implementation
    trust_remote_code: bool = False  # run Python code that comes with the model
    path: str = one_of("auto", "auto", "tree", "plain")  # tree: shared prefixes are run once
    value_head: str = one_of("mlp", "mlp", "linear")  # mlp: two layers; linear: one
    value_hidden: int = number(0, 0, 65536)  # width of the MLP; 0 = the model's hidden size
    detach_value: bool = False  # true: the value loss does not reach the LoRA weights
    checkpointing: bool = False  # recompute blocks in the backward: less memory, more time


@dataclass(frozen=True)
class LoraConfig:
    """The trained low-rank part."""

    r: int = number(16, 1, 8192)  # rank
    alpha: float = positive(32.0, 1e6)  # the update is scaled by alpha / r
    rslora: bool = False  # true: scaled by alpha / sqrt(r)
    dropout: float = below_one(0.0)  # on the input of LoRA; in sft alone
    targets: str | list[str] = "all-linear"  # all-linear, attention, or module name endings


@dataclass(frozen=True)
class DataConfig:
    """Where the labelled examples come from."""

    path: str | None = None  # a folder with the task's files, or a benchmark root
    fallback: str = one_of("none", "none", "bundled")  # without data: an error, or made-up rows
    cache: str | None = None  # where a download is kept; null = the user's cache folder
    url: str = "https://dl.fbaipublicfiles.com/glue/data"  # where a download comes from
    exclude_pretraining_labels: bool = True  # leave out rows that the bundled model saw labelled
    min_words: int = count(0)  # leave out shorter training sentences; 0 = keep all
    limit: int = count(0)  # training examples to use; 0 = all
    max_prompt_tokens: int = count(0)  # longest prompt; 0 = what the context allows


@dataclass(frozen=True)
class CustomConfig:
    """A task of the user's own: named by `task`, with files in csv, tsv, jsonl or parquet."""

    name: str | None = None  # what `task` calls it
    train: str | None = None  # file of labelled rows to train on
    dev: str | None = None  # file of labelled rows to measure by; null = dev_share of train
    test: str | None = None  # file of rows to predict
    dev_share: float = number(0.1, 0, 1, True, True)  # share of train to measure by, without dev
    fields: list[str] = field(default_factory=list)  # the text columns of the prompt
    description: str | None = long_text(None)  # what the task is; {column} stands for a row's text
    query: str | None = long_text(None)  # what is asked of a row; {column} stands for its text
    # The words to answer with,
    labels: list[str] | dict[str, list[str]] = field(default_factory=list)  # or word: value(s)
    label_column: str = "label"  # the column of the right answer
    # A row to train on or to measure by whose label, or whose every text, is empty:
    missing: str = one_of("error", "error", "drop")  # refuse the file, or leave the row out
    low: float | None = number(None, -1e9, 1e9)  # where the answer is a number: the least
    high: float | None = number(None, -1e9, 1e9)  # and the greatest; give both or neither
    step: float = positive(0.2, 1e9)  # spacing of the numbers that are scored as answers
    reward: str = "auto"  # auto, label, rating, exact, f1, or package.module:function
    metrics: list[str] = field(default_factory=list)  # [] = what suits the kind of answer
    rationale: str | None = None  # the column of a written-out reason, for prompt.form=analysis


@dataclass(frozen=True)
class PromptConfig:
    """How a row becomes a prompt; the same in training and evaluation."""

    form: str = one_of("judgement", "judgement", "analysis")  # analysis: reason first, then answer
    shots: int = number(0, 0, 1000)  # labelled training rows shown in each prompt; 0 = none
    balanced: bool = True  # take shots of every label in turn
    chat_template: bool = False  # wrap the prompt in the model's own chat format


@dataclass(frozen=True)
class MixtureConfig:
    """How the rows of several tasks are mixed (`tasks`)."""

    mixing: str = one_of("capped", "capped", "proportional", "equal")  # what decides a task's share
    cap: int = count(30000, min=1)  # capped: the most rows of one task that count


@dataclass(frozen=True)
class RewardConfig:
    """What an answer earns."""

    scale: str = one_of("paper", "paper", "code")  # right/wrong/none: paper 1/0/-1, code 1/-1/-3
    normalise: bool = False  # per task: subtract the running mean, divide by the deviation


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled in training."""

    batch_size: int = number(16, 1, 65536)  # prompts a step
    samples_per_prompt: int = number(1, 1, 4096)  # answers to each prompt; grpo: 2 or more
    max_new_tokens: int = number(16, 1, 10**6)  # longest answer
    temperature: float = number(1.0, 0.001, 1000)  # of sampling, and of every log-probability
    top_k: int = count(0)  # training needs 0 (off)
    top_p: float = number(1.0, min=0, max=1, exclusive_min=True)  # training needs 1 (off)
    # Take old log-probs from the decode pass; auto: if a check at the start finds them exact.
    reuse_logprobs: str = one_of("auto", "auto", "always", "never")  # never: one more pass a step
    reference_cache: bool = True  # keep the reference's log-probs of answers seen before
    cuda_graph: bool = True  # on a GPU: decode by recorded steps, where the model allows it


@dataclass(frozen=True)
class PPOConfig:
    """The PPO update."""

    preset: str = one_of("default", "default", "legacy")  # legacy: the paper's released code
    epochs: int = number(4, 1, 1000)  # passes over each step's answers
    minibatch_size: int = count(16, min=1)  # answers per optimizer step; at most all of a step's
    micro_batch_size: int = count(0)  # answers per forward (memory only); 0 = minibatch
    # How far from 1 the ratio counts,
    clip: float = number(0.2, min=0, max=1, exclusive_min=True, exclusive_max=True)  # both ways
    clip_high: float | None = positive(None, 100)  # the same upwards; null = clip
    # The highest ratio that counts where the advantage is below 0 (arXiv 1912.09729).
    dual_clip: float | None = number(None, 1, 1000, exclusive_min=True)  # null = off
    value_clip: float | None = positive(0.2, 1e6)  # how far a value may move; null = off
    gamma: float = share(1.0)  # discount
    lam: float = share(0.95)  # lambda of GAE
    # Penalty per token (start value if adaptive); without one there is no reference pass and no
    # kl/ref.
    kl_coef: float = number(0.2, 0, 1000)  # 0 = off
    kl_estimator: str = one_of("k1", "k1", "k2", "k3", "exact")  # how the KL is measured
    kl_adaptive: bool = True  # steer kl_coef towards kl_target
    kl_target: float = positive(6.0, 1e6)  # KL of a whole answer to steer towards
    kl_horizon: int = count(10000, min=1)  # answers over which the steering acts
    value_coef: float = number(0.1, 0, 1000)  # weight of the value loss; 0 = off
    entropy_coef: float = number(0.0, 0, 1000)  # weight of the entropy bonus; 0 = off
    whiten_advantages: bool = True  # mean 0, deviation 1 over the step's tokens
    whiten_rewards: bool = False  # deviation 1, the mean kept
    critic_target: str = one_of("gae", "gae", "td0")  # td0: the paper's equation 1
    target_kl: float | None = positive(None, 1e6)  # stop a step's epochs beyond it; null = off
    max_ratio: float = number(10.0, 0, 1e6)  # skip a minibatch with a mean ratio above it; 0 = off


@dataclass(frozen=True)
class GRPOConfig:
    """The GRPO update (arXiv 2402.03300): answers to one prompt are compared; no critic."""

    advantage: str = one_of("group", "group", "rloo")  # over the mean of all, or of the others
    scale: bool = True  # group: divide by the group's deviation; false: Dr. GRPO
    epochs: int = number(1, 1, 1000)  # passes over each step's answers
    minibatch_size: int = count(0)  # answers per optimizer step; 0 = all of a step's
    micro_batch_size: int = count(0)  # answers per forward (memory only); 0 = minibatch
    # How far from 1 the ratio counts,
    clip: float = number(0.2, min=0, max=1, exclusive_min=True, exclusive_max=True)  # both ways
    clip_high: float | None = positive(None, 100)  # the same upwards (DAPO: 0.28); null = clip
    kl_coef: float = number(0.0, 0, 1000)  # weight of the k3 KL in the loss; 0 = no reference pass
    drop_even: bool = True  # leave out groups whose scores are all equal, their KL too
    max_ratio: float = number(10.0, 0, 1e6)  # skip a minibatch with a mean ratio above it; 0 = off
    target_kl: float | None = positive(None, 1e6)  # stop a step's epochs beyond it; null = off


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: the next-token loss on right answers."""

    batch_size: int = number(24, 1, 65536)  # rows per optimizer step
    micro_batch_size: int = count(0)  # rows per forward (memory only); 0 = batch_size
    loss: str = one_of("completion", "completion", "all")  # on the answer, or on the prompt too


@dataclass(frozen=True)
class EncoderConfig:
    """Fine-tuning of an encoder such as BERT (Devlin et al., 2019), the baseline."""

    batch_size: int = number(32, 1, 65536)  # rows per optimizer step
    max_length: int = number(128, 8, 65536)  # tokens of a row; longer ones are cut
    dropout: float = below_one(0.1)  # of the whole encoder and its head


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate; grpo, sft and encoder have defaults of their own."""

    name: str = one_of("adafactor", "adafactor", "adamw")  # the paper trains ppo with adafactor
    lr: float = positive(9e-6, 10)  # highest learning rate
    value_lr: float | None = positive(None, 10)  # of the value head; null = lr
    weight_decay: float = number(0.0, 0, 10)  # share of a weight lost for each unit of lr; 0 = off
    beta1: float = below_one(0.9)  # adamw only: memory of the mean gradient
    beta2: float = below_one(0.95)  # adamw only: memory of the mean square
    eps: float = number(1e-5, 1e-16, 1)  # adamw only: added to the root of the mean square
    max_grad_norm: float = number(1.0, 0, 1e30)  # gradients are scaled down to it; 0 = off
    schedule: str = one_of("cosine", "cosine", "linear", "constant")  # after the warm-up
    warmup: float = share(0.1)  # share of the updates spent climbing to lr; 0 = off
    min_lr_ratio: float = share(0.1)  # cosine and linear end at this share of lr


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run, and what it leaves on disk."""

    steps: int = number(100, 1, 10**8)  # PPO or GRPO iterations, or optimizer steps of sft, encoder
    # Tokens that a forward of the update may run (memory only).
    micro_batch_tokens: int = count(0)  # 0 = no limit on a CPU, the memory plan's on a GPU
    eval_every: int = count(0)  # steps between evaluations; 0 = only at the end
    checkpoint_every: int = count(50)  # steps between checkpoints; 0 = only at the end
    keep_checkpoints: int = count(2, min=1)  # the newest ones; older ones are deleted
    max_bad_steps: int = count(5, min=1)  # stop after so many steps in a row without an update


@dataclass(frozen=True)
class EvalConfig:
    """How the model is scored."""

    split: str = "dev"  # which rows: train, dev or test
    limit: int = count(0)  # examples to use; 0 = all
    batch_size: int = number(64, 1, 65536)  # prompts at a time
    top_k: int = count(0)  # draw the sampled answer from the k likeliest tokens; 0 = off
    top_p: float = number(1.0, min=0, max=1, exclusive_min=True)  # the same by their mass; 1 = off
    before: bool = True  # score the model before training too: the base, or that of init_from
    base: bool = False  # with init_from: score the base too
    # Scored answers: a label's log-probability as it is (sum), by its number of tokens (mean),
    # or less what it is without the text (prior).
    label_scores: str = one_of("sum", "sum", "mean", "prior")
    bootstrap: int = number(1000, 0, 10**5)  # resamples for the confidence interval; 0 = off
    # At the end of a run measure a constant answer, and TF-IDF with logistic regression, too.
    baselines: bool = True  # TF-IDF needs scikit-learn


@dataclass(frozen=True)
class LogConfig:
    """What is shown and recorded."""

    tensorboard: bool = False  # write TensorBoard files
    wandb: bool = False  # send metrics to Weights & Biases
    project: str = "ppo_nlu"  # project name at Weights & Biases
    progress: bool = True  # a bar; where it is no terminal, a line each tenth
    plot: bool = True  # draw curves.png at the end
