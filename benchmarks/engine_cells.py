"""What `engines.py` measures: the cells of each part, the rows they leave, and what is left to do.

A cell is one engine at one setting; the rows of a csv are cells that were measured. Nothing here
imports torch.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

TRL = {"ppo": "1.12.0", "grpo": "1.16.0"}  # the last release with PPO, and the newest with GRPO
PARTS = ("bars", "natural", "bundled", "memory", "startup", "cost", "reward", "ablation", "scaling")
NEW_TOKENS = 8
GROUP = 8

# Cells are known by these columns; the rest of a row is what was measured, and where.
KEY = (
    "part", "engine", "method", "model", "task", "B", "G", "tokens", "stop", "variant", "length",
    "shared", "micro", "N", "seed", "round",
)  # fmt: skip
COLUMNS = (
    "run", *KEY, "version", "cpu_s_per_1000", "wall_s_per_1000", "answers_per_s",
    "peak_mb_above_import", "prompt_tokens", "answer_tokens", "trained_weights", "reward_first",
    "reward_last", "rewards", "token_passes", "phases", "first_step_s", "cell_s", "epochs",
    "threads", "jobs", "machine", "cores", "torch", "transformers", "commit", "date",
)  # fmt: skip
Row = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """One engine at one setting. B = prompts · group answers a step, N = steps."""

    part: str
    engine: str  # ours or trl
    method: str  # ppo, grpo or sft
    model: str  # bundled, llama30, llama30-long, or a shape of engine_setup.SHAPES
    task: str  # sst2, glue/rte, or synthetic
    prompts: int  # a step
    group: int = 1  # answers a prompt
    tokens: int = NEW_TOKENS  # longest answer
    stop: str = "equal"  # equal: every answer has all tokens; natural: where the engine can stop
    variant: str = "full"  # ours with something switched off
    steps: int = 1  # N; 2N are run
    seed: int = 0
    round: int = 0
    micro: int = 0  # answers a forward of the update; 0 = all of a step's
    reward: str = "noise"  # at random, so that every group has spread; or task: by its rule
    length: int = 0  # of synthetic prompts, in tokens
    shared: int = 0  # percent of it that all of a step's prompts share
    rows: int = 0  # distinct rows that the steps go through again and again; 0 = all
    lr: float = 1e-4
    options: tuple[str, ...] = ()  # further overrides of our config

    @property
    def answers(self) -> int:
        """B, of one step."""
        return self.prompts * self.group

    @property
    def version(self) -> str:
        """The rival's release, or "" for ours."""
        return TRL[self.method] if self.engine == "trl" else ""

    def key(self) -> tuple[str, ...]:
        """The columns that a measured row has in common with the cell."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own |= {"B": self.answers, "G": self.group, "N": self.steps}
        return tuple(str(own[name]) for name in KEY)


def of_part(part: str, seeds: Sequence[int] = (0, 1, 2)) -> list[Cell]:
    """The cells of a part, ours and theirs in turn."""
    return {
        "bars": bars,
        "natural": natural,
        "bundled": bundled,
        "memory": memory,
        "startup": lambda: [
            Cell("startup", "ours", "ppo", "bundled", "sst2", 64, stop="natural", round=i)
            for i in range(3)
        ],
        "cost": cost,
        "reward": lambda: reward(seeds),
        "ablation": ablation,
        "scaling": scaling,
    }[part]()


def pair(cell: Cell, steps: int, theirs_micro: int = 0) -> list[Cell]:
    """A cell of ours and the rival's, over the same steps: the timed ones see the same prompts."""
    cell = replace(cell, steps=steps)
    return [cell, replace(cell, engine="trl", micro=theirs_micro or cell.micro)]


def bars() -> list[Cell]:
    """The cells of the bars: the 30M Llama, equal answer tokens."""
    found = []
    for task in ("sst2", "glue/rte"):
        for answers in (16, 64):
            cell = Cell("bars", "ours", "ppo", "llama30", task, answers)
            # 64 rows of RTE with all their logits and two trunks' states may go beyond 20 GB in
            # TRL's PPO: there its micro-batch is 16, which costs it no time.
            micro = 16 if (task, answers) == ("glue/rte", 64) else 0
            found += pair(cell, 2 if (task, answers) == ("sst2", 16) else 1, micro)
            cell = replace(cell, method="grpo", prompts=answers // GROUP, group=GROUP)
            found += pair(cell, 4 if answers == 16 else 1)
    return found


def natural() -> list[Cell]:
    """The 30M Llama with natural stop: a random model hardly ever stops, so B 16 will do."""
    few = [cell for cell in bars() if cell.answers == 16]
    return [replace(cell, part="natural", stop="natural", steps=1) for cell in few]


def bundled() -> list[Cell]:
    """The bundled model, both ways of stopping; the task's own reward in PPO."""
    found = []
    for task in ("sst2", "glue/rte"):
        for answers, steps in ((16, 3), (64, 1)):
            for stop in ("equal", "natural"):
                cell = Cell("bundled", "ours", "ppo", "bundled", task, answers, stop=stop)
                found += pair(replace(cell, reward="task"), steps)
                cell = replace(cell, method="grpo", prompts=answers // GROUP, group=GROUP)
                found += pair(cell, steps)
    return found


def memory() -> list[Cell]:
    """Peak memory at B 64 once more, with micro-batches of 16 on both sides."""
    cell = Cell("memory", "ours", "ppo", "llama30", "sst2", 64, micro=16)
    return pair(cell, 1)


def cost() -> list[Cell]:
    """PPO and SFT of ours on as many examples a step; PPO's answers stop where they stop."""
    found = []
    for model, steps in (("bundled", 10), ("llama30", 4)):
        for method in ("ppo", "sft"):
            cell = Cell("cost", "ours", method, model, "sst2", 16, stop="natural", steps=steps)
            found.append(replace(cell, reward="task"))
    return found


def reward(seeds: Iterable[int], steps: int = 40) -> list[Cell]:
    """Reward reached by the bundled model after 64 · `steps` answers, the same for both."""
    found = []
    for seed in seeds:
        cell = Cell("reward", "ours", "ppo", "bundled", "sst2", 64, stop="natural", seed=seed)
        found += pair(replace(cell, reward="task", lr=5e-4), steps // 2)
    return found


VARIANTS = {
    "full": (),
    "no-tree": ("model.path=plain",),  # one padded row an answer, blocks as the library's modules
    "all-logits": (),  # engine_ours runs the LM head on every position
    "no-reuse": ("rollout.reuse_logprobs=never",),
    "no-cache": ("rollout.reference_cache=false",),
}


def ablation() -> list[Cell]:
    """Ours with one thing switched off at a time.

    The reference cache has something to do where answers repeat: the bundled model on 64 rows that
    come round again, after steps enough to have seen them.
    """
    found = []
    base = Cell("ablation", "ours", "ppo", "llama30", "sst2", 16, steps=3)
    several = replace(base, method="grpo", prompts=8, group=GROUP, steps=2)
    again = Cell(
        "ablation", "ours", "ppo", "bundled", "sst2", 64, stop="natural", steps=6, rows=64,
        reward="task",
    )  # fmt: skip
    rte = replace(base, task="glue/rte", steps=2)
    for cell in (base, rte, several, again, replace(again, method="grpo", prompts=8, group=GROUP)):
        for name, options in VARIANTS.items():
            found.append(replace(cell, variant=name, options=options))
    return found


def scaling() -> list[Cell]:
    """Ours along prompt length, shared part, batch and answers a prompt, one at a time.

    The middle of all four: 16 prompts of 200 tokens, half of them shared.
    """
    middle = Cell(
        "scaling", "ours", "ppo", "llama30-long", "synthetic", 16, length=200, shared=50, steps=2
    )
    found = [middle]
    found += [replace(middle, length=n, steps=1) for n in (50, 100, 500, 1000, 2000)]
    found += [replace(middle, shared=share) for share in (0, 25, 75, 95)]
    found += [replace(middle, prompts=n, steps=3 if n < 16 else 1) for n in (4, 8, 32, 64, 128)]
    grouped = replace(middle, method="grpo", steps=3)
    found += [replace(grouped, prompts=4, group=n) for n in (2, 4, 8, 16)]
    found += [replace(middle, prompts=4, group=n, steps=2) for n in (2, 4, 8, 16)]
    return found


def tiny(cell: Cell) -> Cell:
    """The same cell as small as it can be, to see that it runs: two steps of a few answers."""
    prompts = min(cell.prompts, 2 if cell.group > 1 else 4)
    group = min(cell.group, 4)
    micro = min(cell.micro, 2)
    return replace(
        cell, prompts=prompts, group=group, steps=1, micro=micro, length=min(cell.length, 300)
    )


# ---- figures of a cell


def between(clocks: Sequence[Sequence[float]], steps: int, column: int) -> float:
    """Seconds of the steps N+1 to 2N: the clock after 2N steps minus that after N.

    Args:
        clocks: for each moment the readings; the first before step 1, then one after each step.
        steps: N.
        column: which reading; 0 process CPU seconds, 1 wall seconds.
    """
    if len(clocks) != 2 * steps + 1:
        raise ValueError(f"{len(clocks)} readings of {2 * steps} steps: one more is needed")
    return clocks[2 * steps][column] - clocks[steps][column]


def figures(cell: Cell, result: Mapping) -> Row:
    """The columns that follow from what an engine's process reported."""
    cpu, wall = (between(result["clocks"], cell.steps, column) for column in (0, 1))
    answers = cell.steps * cell.answers
    row = {
        "cpu_s_per_1000": f"{1000 * cpu / answers:.2f}",
        "wall_s_per_1000": f"{1000 * wall / answers:.2f}",
        "answers_per_s": f"{answers / wall:.3f}",
        "peak_mb_above_import": f"{result['peak_mb'] - result['import_mb']:.0f}",
    }
    rewards = result.get("rewards") or []
    if rewards and cell.reward == "task":
        size = max(1, len(rewards) // 8)
        parts = [statistics.mean(rewards[i : i + size]) for i in range(0, len(rewards), size)]
        row |= {
            "reward_first": f"{parts[0]:.4f}",
            "reward_last": f"{statistics.mean(rewards[-size:]):.4f}",
            "rewards": " ".join(f"{part:.3f}" for part in parts),
        }
    return row


# ---- the csv


def read(path: Path) -> list[Row]:
    """All rows of a csv; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def ready(path: Path) -> None:
    """A csv to append to: made with its heads where it is not there; of other columns, an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            if next(csv.reader(file)) == list(COLUMNS):
                return
        raise SystemExit(f"{path} has other columns; move it away, or name another file: --csv")
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(COLUMNS)


def append(path: Path, row: Mapping[str, object]) -> None:
    """One more row of a csv that is `ready`."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, restval="").writerow(row)


def remaining(cells: Iterable[Cell], rows: Iterable[Row], run: str) -> list[Cell]:
    """The cells that this run has no row of."""
    done = {tuple(row[name] for name in KEY) for row in rows if row["run"] == run}
    return [cell for cell in cells if cell.key() not in done]
