"""Which architectures the engine runs, and that each gives what plain transformers gives.

Each row of `architecture_table` is a tiny random model. The program saves it, loads it as a user
would, and compares with the unmodified model, which runs one row at a time, without padding and
without a cache. `COMPARISONS` names what is compared. Run it with

    python -m tests.architectures [NAME ...] [--write]

`--write` renders the outcome of all rows as `ppo_nlu/architectures.md`. The exit code is 1 where a
row is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

try:
    import tiny
    from architecture_table import CONTEXT, TABLE, Row
except ModuleNotFoundError:  # as a program, from the repository's root
    from tests import tiny
    from tests.architecture_table import CONTEXT, TABLE, Row

from ppo_nlu.config import Config, LoraConfig, ModelConfig
from ppo_nlu.errors import UserError
from ppo_nlu.methods import memory
from ppo_nlu.methods.workload import Workload
from ppo_nlu.model import generate, lora
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import flops
from ppo_nlu.tree.checkpointing import checkpoint_blocks

DOCUMENT = Path(__file__).parents[1] / "ppo_nlu" / "architectures.md"
BOUND = 1e-4  # of log-probabilities, and of gradients in units of the largest, in fp32
LONG = 150  # tokens of the longest row
LIMIT = 5  # tokens of an answer at most
GREEDY = generate.Sampling(LIMIT, greedy=True)
HEAD = """\
# Architectures

What `model.name_or_path` may be, as `python -m tests.architectures --write` finds it with
transformers {version} on tiny random models. Each is compared in fp32 with the unmodified model,
which runs one row at a time without padding and without a cache: log-probabilities with LoRA off
and on, behind shared prefixes, in rows longer than a window; answers, greedy and sampled; gradients
of A and B, in units of the largest; the merged model. In bf16 the path is the same, or plain in
place of a tree.

- *tree*: what rows share is run once. *plain*: one padded row an answer. *refused*: the note is the
  line that a user reads.
- A name says what the configuration has beside the usual. Windows are of 16 tokens unless a number
  is given.
- Contexts are small here. Where one is limited, the position table of all rows of a batch would
  change with its longest, or a window ends there: in Phi-3's 128k models at 4,096 tokens.

| architecture | path | largest gap | note |
|---|---|---|---|"""


# ---- the model, saved and loaded --------------------------------------------------------------


def build(row: Row, folder: Path) -> None:
    """Save a random model of this architecture, with the tests' tokenizer."""
    config = AutoConfig.for_model(row.kind, **row.options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw) * 0.2
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise / 2)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def plain(row: Row, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The unmodified model, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), attn_implementation=row.reference, dtype=dtype
    )
    return model.eval().requires_grad_(False)


def load(folder: Path, **settings: Any) -> tuple[Policy, str]:
    """The policy as a user loads it, and what is said meanwhile."""
    model = ModelConfig(str(folder), device="cpu", **settings)
    cfg = Config(task="sst2", model=model, lora=LoraConfig(r=4, alpha=8.0))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        policy = load_policy(cfg)
    return policy, said.getvalue().replace(str(folder), "FOLDER").strip()


def adapt(model: nn.Module, policy: Policy) -> dict[str, Tensor]:
    """Add scaling · B A to the plain model's weights; these weights by the layer's name."""
    names, found = dict(model.named_modules()), {}
    for name, layer in lora.lora_layers(policy.model).items():
        twin = names[name]
        delta = layer.scaling * layer.lora_b.detach() @ layer.lora_a.detach()
        twin.weight.add_(delta if isinstance(twin, nn.Linear) else delta.t())
        found[name] = twin.weight.requires_grad_(True)
    return found


# ---- plain transformers, one row at a time ----------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Prompts, and answers with the prompt of each."""

    prompts: list[list[int]]
    answers: list[list[int]]
    prompt_of: list[int]

    @classmethod
    def draw(cls, shared: int, own: Sequence[int], prompt_of: Sequence[int], longest: int) -> Rows:
        """Prompts of `shared` common tokens and `own` of their own, short enough for an answer
        within `longest`; answers of 1 to 5 tokens."""
        draw = torch.Generator().manual_seed(shared)

        def tokens(count: int) -> list[int]:
            return torch.randint(5, tiny.VOCAB, (count,), generator=draw).tolist()

        prefix = tokens(shared)
        prompts = [[*prefix, *tokens(n)][: longest - LIMIT] for n in own]
        return cls(
            prompts, [tokens(1 + (j + 1) % LIMIT) for j in range(len(prompt_of))], list(prompt_of)
        )

    def chosen(self, table: Tensor) -> Tensor:
        """The entries (N,) of the answers' tokens in a table (N, V)."""
        tokens = torch.tensor([token for answer in self.answers for token in answer])
        return table.gather(1, tokens[:, None]).squeeze(1)


def table_alone(model: Any, rows: Rows, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (N, V) of all tokens where the answers' tokens stand, row by row."""
    tables = []
    for p, answer in zip(rows.prompt_of, rows.answers, strict=True):
        prompt = rows.prompts[p]
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        tables.append((logits.float() / temperature).log_softmax(-1))
    return torch.cat(tables)


def alone(model: Any, rows: Rows, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (N,) of the answers' tokens, row by row."""
    return rows.chosen(table_alone(model, rows, temperature))


# ---- comparisons ------------------------------------------------------------------------------


@dataclass
class Case:
    """A policy with LoRA at random, the plain model, and the plain model with W + scaling · B A."""

    folder: Path
    policy: Policy
    base: Any
    adapted: Any
    weights: dict[str, Tensor]
    few: Rows
    long: Rows

    def scored(self, rows: Rows, **more: Any) -> Tensor:
        """The policy's log-probabilities (N,)."""
        found = self.policy.score(rows.prompts, rows.answers, rows.prompt_of, **more)
        return found.logprobs[found.mask]


@torch.no_grad()
def reference(case: Case) -> float:
    """Several answers to ragged prompts that share a prefix, LoRA off."""
    with lora.lora_disabled(case.policy.model):
        return gap(case.scored(case.few, values=True), alone(case.base, case.few))


@torch.no_grad()
def score(case: Case) -> float:
    """The same with LoRA."""
    return gap(case.scored(case.few), alone(case.adapted, case.few))


@torch.no_grad()
def tempered(case: Case) -> float:
    """At a temperature, and the entropy there."""
    few = case.few
    found = case.policy.score(few.prompts, few.answers, few.prompt_of, 0.7)
    table = table_alone(case.adapted, few, 0.7)
    entropy = -(table.exp() * table).sum(-1)
    off = gap(found.logprobs[found.mask], few.chosen(table))
    return max(off, gap(found.entropy[found.mask], entropy))


@torch.no_grad()
def joined(case: Case) -> float:
    """One answer a prompt, which the tree joins to its prompt."""
    count = len(case.few.prompts)
    rows = Rows(case.few.prompts, case.few.answers[:count], list(range(count)))
    return gap(case.scored(rows), alone(case.adapted, rows))


@torch.no_grad()
def prefix_cache(case: Case) -> float:
    """Behind a prefix that was run before."""
    worst = 0.0
    for rows in (case.few, case.long):
        found = case.scored(rows, prefix_cache=case.policy.prefix_cache(rows.prompts))
        worst = max(worst, gap(found, alone(case.adapted, rows)))
    return worst


@torch.no_grad()
def long(case: Case) -> float:
    """Rows longer than any window or switch of the position table, beside short ones."""
    return gap(case.scored(case.long), alone(case.adapted, case.long))


@torch.no_grad()
def generated(case: Case) -> float:
    """Greedy answers are the plain model's own, and have its log-probs."""
    worst = 0.0
    for rows in (case.few, case.long):
        drawn = generate.generate(case.policy, rows.prompts, GREEDY, critic=True)
        found = Rows(rows.prompts, drawn.rows, list(range(len(rows.prompts))))
        table = table_alone(case.adapted, found)
        chosen = found.chosen(table)
        worst = max(worst, gap(drawn.logprobs[drawn.mask], chosen), gap(table.amax(-1), chosen))
    return worst


@torch.no_grad()
def sampled(case: Case) -> float:
    """Two sampled answers a prompt have the log-probs at the temperature."""
    prompts, draw = case.few.prompts, torch.Generator().manual_seed(5)
    heat = generate.Sampling(LIMIT, samples=2, temperature=0.7)
    drawn = generate.generate(case.policy, prompts, heat, generator=draw)
    found = Rows(prompts, drawn.rows, [p for p in range(len(prompts)) for _ in range(2)])
    return gap(drawn.logprobs[drawn.mask], alone(case.adapted, found, 0.7))


def prompt_pass(case: Case) -> float:
    """Answers scored behind the rollout's own pass over the prompts, and their gradient."""
    worst = 0.0
    for rows in (case.few, case.long):
        greedy = generate.Sampling(2, greedy=True)
        drawn = generate.generate(case.policy, rows.prompts, greedy, keep_graph=10**6)
        if drawn.prompt_pass is not None:
            found = case.scored(rows, prompt_pass=drawn.prompt_pass)
            off = gap(found, alone(case.adapted, rows))
            worst = max(worst, off, _gradient_gap(case, rows, found.sum()))
    return worst


def gradient(case: Case) -> float:
    """Of the sum of log-probs, with respect to A and B."""
    both = (case.few, case.long)
    return max(_gradient_gap(case, rows, case.scored(rows).sum()) for rows in both)


def checkpointed(case: Case) -> float:
    """The same with blocks that are run again in the backward; the policy stays so."""
    if not case.policy.tree:
        return 0.0
    checkpoint_blocks(case.policy.decoder)
    return gradient(case)


def on_plain(case: Case) -> float:
    """Scores, answers and gradients of a policy that is told to take the plain path."""
    if not case.policy.tree:
        return 0.0
    try:
        policy, _ = load(case.folder, path="plain")
    except UserError:
        return 0.0  # which is no wrong answer
    tiny.shake(policy)
    other = replace(case, policy=policy)
    return max(compare(other) for compare in (score, long, generated, gradient))


def _gradient_gap(case: Case, rows: Rows, loss: Tensor) -> float:
    """In units of the largest entry: with G = d loss / d W of the plain model, the gradient of B
    is scaling · G Aᵀ, that of A is scaling · Bᵀ G."""
    layers = lora.lora_layers(case.policy.model)
    pairs = [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]
    found = torch.autograd.grad(loss, pairs, allow_unused=True, materialize_grads=True)
    total, weights = alone(case.adapted, rows).sum(), [case.weights[n] for n in layers]
    grads = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
    wanted = []
    for layer, grad in zip(layers.values(), grads, strict=True):
        g = grad.t() if layer.transposed else grad
        a, b = layer.lora_a.detach(), layer.lora_b.detach()
        wanted += [layer.scaling * b.t() @ g, layer.scaling * g @ a.t()]
    size = max(1.0, *(float(w.abs().max()) for w in wanted))
    return max(gap(f, w) for f, w in zip(found, wanted, strict=True)) / size


@torch.no_grad()
def merged(case: Case) -> float:
    """The model that an export writes."""
    return gap(alone(lora.merge(case.policy.model), case.few), alone(case.adapted, case.few))


def planned(case: Case) -> float:
    """The plans of memory and time that training prints can be made."""
    cfg = Config(task="sst2", model=ModelConfig(str(case.folder), device="cpu"))
    trained = lora.lora_parameters(case.policy.model)
    work = Workload.on_rollouts(cfg.rollout, cfg.ppo, critic=True)
    memory.plan(case.policy, cfg, work, trained, case.few.prompts)
    flops.weights_of(case.policy)
    return 0.0


def gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference; infinite where a number is not finite."""
    assert found.shape == wanted.shape
    worst = (found.detach() - wanted.detach()).abs().max()
    return float(worst) if bool(torch.isfinite(worst)) else float("inf")


COMPARISONS: dict[str, Callable[[Case], float]] = {
    "reference": reference,
    "score": score,
    "tempered": tempered,
    "joined": joined,
    "prefix_cache": prefix_cache,
    "long": long,
    "generate": generated,
    "sample": sampled,
    "prompt_pass": prompt_pass,
    "gradient": gradient,
    "merged": merged,
    "planned": planned,
    "plain path": on_plain,
    "checkpointed": checkpointed,
}


# ---- one row of the table ---------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of an architecture."""

    name: str
    path: str = "none"  # tree, plain, refused, skipped
    line: str = ""  # why it is refused or skipped
    note: str = ""
    gaps: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # comparison -> what is wrong

    @property
    def wrong(self) -> bool:
        """Whether something fails or is further off than the bound."""
        return bool(self.failed) or any(g > BOUND for g in self.gaps.values())

    def __str__(self) -> str:
        if self.line:
            return "; ".join([f"{self.path}: {self.line}", *self._faults()])
        worst = f"gap {max(self.gaps.values(), default=0.0):.1e}"
        return "; ".join(x for x in [self.path, worst, self.note, *self._faults()] if x)

    def _faults(self) -> list[str]:
        far = [f"WRONG: {k}: gap {g:.1e}" for k, g in self.gaps.items() if g > BOUND]
        return [*far, *(f"{k}: {text}" for k, text in self.failed.items())]


def traced(error: BaseException) -> str:
    """The error's first line, and the last frames of this package and of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "ppo_nlu" in f.filename and "site-packages" not in f.filename]
    shown = dict.fromkeys(f"{Path(f.filename).name}:{f.lineno}" for f in [*ours, frames[-1]][-2:])
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"TRACEBACK: {type(error).__name__}: {first} ({', '.join(shown)})"


def examine(row: Row) -> Outcome:
    """Build, load and compare one architecture."""
    if row.kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Outcome(row.name, "skipped", f"transformers {transformers.__version__} has no such")
    with tempfile.TemporaryDirectory() as folder:
        return _examined(row, Path(folder))


def _examined(row: Row, folder: Path) -> Outcome:
    few = Rows.draw(24, [3, 9, 1, 14], [0, 0, 0, 1, 2, 3, 3], LONG)
    try:
        build(row, folder)
        base, adapted = plain(row, folder), plain(row, folder)
        _tells(base, few)
    except Exception as error:
        return Outcome(row.name, "skipped", f"plain transformers cannot run it: {traced(error)}")
    try:
        policy, said = load(folder)
    except UserError as error:
        line = str(error).replace(str(folder), "FOLDER")
        return _in_low_precision(Outcome(row.name, "refused", line), row, folder, base, LONG)
    except Exception as error:
        return Outcome(row.name, failed={"load": traced(error)})
    notes = _notes(policy, row)
    path, note = "tree" if policy.tree else "plain", ", ".join(filter(None, [*notes, row.note]))
    found = Outcome(row.name, path, note=note)
    if any(word in note and word not in said for note in notes for word in ("eager", "context")):
        found.failed["load"] = f"WRONG: {notes} is not told: {said!r}"
    tiny.shake(policy)
    longest = min(LONG, policy.context)
    many = Rows.draw(40, [2, longest, 8, 30], [0, 1, 2, 3], longest)
    few = (
        few
        if longest == LONG
        else replace(few, prompts=[p[: longest - LIMIT] for p in few.prompts])
    )
    case = Case(folder, policy, base, adapted, adapt(adapted, policy), few, many)
    for name, compare in COMPARISONS.items():
        try:
            found.gaps[name] = compare(case)
        except Exception as error:
            found.failed[name] = traced(error)
    return _in_low_precision(found, row, folder, base, longest)


def _tells(model: Any, rows: Rows) -> None:
    """The model's answers must depend on the tokens before them, or nothing is compared."""
    other = [[*p[:-4], (p[-4] - 4) % (tiny.VOCAB - 5) + 5, *p[-3:]] for p in rows.prompts]
    with torch.no_grad():
        moved = gap(alone(model, Rows(other, rows.answers, rows.prompt_of)), alone(model, rows))
    assert moved > 100 * BOUND, f"its answers hardly depend on its prompts: {moved:.1e}"


def _notes(policy: Policy, row: Row) -> list[str]:
    """How the policy differs from what was asked for, which it must say while it is loaded."""
    notes, declared = [], row.options.get("max_position_embeddings", CONTEXT)
    attention = policy.model.config._attn_implementation
    if attention != "sdpa":
        notes.append(f"{attention} attention")
    if policy.context < declared:
        notes.append(f"context limited to {policy.context} of {declared} tokens")
    window = getattr(policy, "window", None)
    if policy.tree and window and window < policy.context:
        notes.append(f"rows of more than {window} tokens are plain")
    return notes


@torch.no_grad()
def _in_low_precision(found: Outcome, row: Row, folder: Path, base: Any, longest: int) -> Outcome:
    """In bf16 nothing may be taken that is wrong in fp32, and the error must be bf16's own.

    The median, by the same attention: where rounding sends a token to another expert, the size of
    its error says nothing. Over some 130 tokens: over 20 it differed threefold by chance.
    """
    rows = Rows.draw(24, [3, 9, 1, 14] * 11, range(44), longest)
    try:
        policy, _ = load(folder, dtype="bfloat16")
        path = "tree" if policy.tree else "plain"
    except UserError:
        path = "refused"
    except Exception as error:
        found.failed["bfloat16"] = traced(error)
        return found
    if path != found.path and (found.path, path) != ("tree", "plain"):  # which costs time alone
        found.failed["bfloat16"] = f"WRONG: {path} in bfloat16, {found.path} in float32"
    elif path != "refused":
        exact = alone(base, rows)
        scored = policy.score(rows.prompts, rows.answers, rows.prompt_of)
        ours = (scored.logprobs[scored.mask] - exact).abs().median()
        alike = replace(row, reference=policy.model.config._attn_implementation)
        theirs = (alone(plain(alike, folder, torch.bfloat16), rows) - exact).abs().median()
        if not ours <= 2 * theirs + 1e-3:
            found.failed["bfloat16"] = f"WRONG: off by {ours:.1e} in bfloat16, plain {theirs:.1e}"
    return found


# ---- the program ------------------------------------------------------------------------------


def render(outcomes: Sequence[Outcome]) -> str:
    """The document."""
    return "\n".join([HEAD.format(version=transformers.__version__), *map(line_of, outcomes), ""])


def line_of(found: Outcome) -> str:
    """A row of the document; without digits that change from run to run."""
    within = "" if found.line else f"< {BOUND:.0e}".replace("e-0", "e-")
    text = (found.line or found.note).replace("|", "\\|")
    return f"| {found.name} | {found.path} | {'wrong' if found.wrong else within} | {text} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows; default: all")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    args = parser.parse_args(argv)
    rows = {row.name: row for row in TABLE}
    unknown = [name for name in args.names if name not in rows]
    if unknown or (args.write and args.names):
        parser.error(f"no such row: {', '.join(unknown)}" if unknown else "--write takes all rows")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcomes = []
    for name in args.names or rows:
        outcomes.append(examine(rows[name]))
        print(f"{name:24} {outcomes[-1]}", flush=True)
    if args.write:
        DOCUMENT.write_text(render(outcomes), encoding="utf-8")
    return int(any(found.wrong for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
