"""The engines' benchmark: its differences, ratios, bars and counts by hand; a run goes on."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import engine_cells, engine_roofline, engine_setup, engine_summary, engines  # noqa: E402
from benchmarks.engine_cells import COLUMNS, KEY, Cell  # noqa: E402
from benchmarks.engine_roofline import Size, passes  # noqa: E402

CELL = Cell("bars", "ours", "ppo", "llama30", "sst2", 16, steps=2)


def row(cell: Cell, run: str = "r", **figures: object) -> dict[str, str]:
    """A measured row of a cell."""
    key = dict(zip(KEY, cell.key(), strict=True))
    return {
        name: str(value)
        for name, value in (dict.fromkeys(COLUMNS, "") | key | {"run": run} | figures).items()
    }


# ---- a cell's figures


def test_start_up_and_the_first_steps_do_not_count() -> None:
    """Five steps' worth of readings: 9 s before the first, 5 s the first, then 1, 2 and 4 s. Of
    four steps with N = 2 the last two count, 2 + 4."""
    clocks = [[9.0, 90.0], [14.0, 95.0], [15.0, 99.0], [17.0, 103.0], [21.0, 111.0]]
    assert engine_cells.between(clocks, 2, 0) == 6.0
    assert engine_cells.between(clocks, 2, 1) == 12.0
    with pytest.raises(ValueError, match="5 readings of 6 steps"):
        engine_cells.between(clocks, 3, 0)


def test_figures_are_per_thousand_answers_and_above_the_imports() -> None:
    """Two steps of 16 answers in 6 CPU s and 12 s: 187.5 and 375 s per 1,000, 32/12 a second."""
    clocks = [[9.0, 90.0], [14.0, 95.0], [15.0, 99.0], [17.0, 103.0], [21.0, 111.0]]
    result = {"clocks": clocks, "peak_mb": 1300.0, "import_mb": 400.0, "rewards": [0.1, 0.2]}
    found = engine_cells.figures(CELL, result)
    assert found == {
        "cpu_s_per_1000": "187.50",
        "wall_s_per_1000": "375.00",
        "answers_per_s": "2.667",
        "peak_mb_above_import": "900",
    }
    rewards = [float(i) for i in range(16)]  # eighths of two steps each
    with_reward = replace(CELL, steps=2, reward="task")
    found = engine_cells.figures(with_reward, result | {"rewards": rewards})
    assert (found["reward_first"], found["reward_last"]) == ("0.5000", "14.5000")
    assert found["rewards"].split() == [f"{2 * i + 0.5:.3f}" for i in range(8)]


def test_groups_count_all_their_answers() -> None:
    cell = replace(CELL, method="grpo", prompts=8, group=8, steps=1)
    clocks = [[0.0, 0.0], [1.0, 1.0], [2.92, 4.0]]
    found = engine_cells.figures(cell, {"clocks": clocks, "peak_mb": 2.0, "import_mb": 1.0})
    assert found["cpu_s_per_1000"] == "30.00"  # 1.92 s for 64 answers


# ---- the cells


def test_bars_are_measured_at_equal_settings() -> None:
    """Ours and theirs in turn, the same but for TRL's micro-batch; all settings of the table."""
    cells = engine_cells.of_part("bars")
    assert [cell.engine for cell in cells] == ["ours", "trl"] * 8
    for ours, theirs in zip(cells[::2], cells[1::2], strict=True):
        assert replace(theirs, engine="ours", micro=ours.micro) == ours
        assert (ours.model, ours.stop, ours.tokens) == ("llama30", "equal", 8)
    settings = {(c.method, c.task, c.answers, c.group) for c in cells}
    assert settings == {
        (method, task, answers, group)
        for method, group in (("ppo", 1), ("grpo", 8))
        for task in ("sst2", "glue/rte")
        for answers in (16, 64)
    }


@pytest.mark.parametrize("part", engine_cells.PARTS)
def test_no_two_cells_of_a_part_are_the_same(part: str) -> None:
    cells = engine_cells.of_part(part)
    assert len({cell.key() for cell in cells}) == len(cells) > 0
    for cell in cells:
        small = engine_cells.tiny(cell)
        assert small.answers <= 16 and not (small.micro and small.answers % small.micro)


# ---- the csv


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    engine_cells.ready(path)
    cells = [CELL, replace(CELL, engine="trl"), replace(CELL, round=1)]
    engine_cells.append(path, row(cells[1], "today"))
    rows = engine_cells.read(path)
    assert engine_cells.remaining(cells, rows, "today") == [cells[0], cells[2]]
    assert engine_cells.remaining(cells, rows, "tomorrow") == cells
    engine_cells.ready(path)  # a second time: nothing is lost
    assert len(engine_cells.read(path)) == 1


def test_rows_of_other_columns_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other columns"):
        engine_cells.ready(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_what_is_left_is_listed_without_measuring(tmp_path: Path, capsys) -> None:
    path = tmp_path / "rows.csv"
    engine_cells.ready(path)
    cells = engine_cells.of_part("bars")
    engine_cells.append(path, row(cells[0], "x"))
    options = ["--csv", str(path), "--run", "x", "--list"]
    assert engines.main(["bars", *options]) == 0
    said = capsys.readouterr().out
    assert "15 of 16 cells" in said and engines.name_of(cells[0]) not in said
    assert engines.main(["bars", *options, "--engines", "trl", "--answers", "64"]) == 0
    assert "4 of 4 cells" in capsys.readouterr().out


# ---- bars


def measured(ours: float, theirs: float, **more: object) -> list[dict[str, str]]:
    """SST-2, PPO, B 16: CPU seconds of ours and theirs."""
    cells = engine_cells.of_part("bars")[:2]
    return [
        row(cell, cpu_s_per_1000=cpu, **more)
        for cell, cpu in zip(cells, (ours, theirs), strict=True)
    ]


def test_a_speed_bar_is_met_from_ten_times_on() -> None:
    first = engine_summary.bars(measured(100, 1000))[0]
    assert (first.measured, first.bar, first.met) == ("10.0x", "≥ 10x", True)
    assert engine_summary.bars(measured(101, 1000))[0].met is False
    assert engine_summary.bars(measured(100, 1000)[:1])[0].met is None
    rounds = [*measured(100, 1000), *measured(300, 9000), *measured(120, 1100)]
    assert engine_summary.bars(rounds)[0].measured == "9.2x"  # of medians: 1100 / 120


def test_our_variants_carry_no_bar() -> None:
    rows = measured(100, 1000)
    rows.append(rows[0] | {"variant": "no-tree", "cpu_s_per_1000": "1"})
    assert engine_summary.bars(rows)[0].measured == "10.0x"


def test_memory_and_start_up_bars() -> None:
    cells = [c for c in engine_cells.of_part("bars") if (c.task, c.answers) == ("sst2", 64)][:2]
    rows = [row(c, peak_mb_above_import=mb) for c, mb in zip(cells, (1000, 1999), strict=True)]
    (bar,) = [b for b in engine_summary.bars(rows) if "peak" in b.what and b.met is not None]
    assert (bar.measured, bar.met) == ("0.50", False)  # 1000 of 1999 is more than half
    rows[1]["peak_mb_above_import"] = "2000"
    (bar,) = [b for b in engine_summary.bars(rows) if "peak" in b.what and b.met is not None]
    assert bar.met is True
    starts = [
        row(c, first_step_s=s)
        for c, s in zip(engine_cells.of_part("startup"), (9.0, 2.0, 1.0), strict=True)
    ]
    assert engine_summary.startup_bar(starts).met is True  # the median
    starts[2]["first_step_s"] = "2.1"
    assert engine_summary.startup_bar(starts).met is False


def test_reward_may_fall_behind_by_the_spread_only() -> None:
    """Theirs 0.5, 0.6 and 0.7: mean 0.6, deviation 0.1; ours must reach 0.5."""
    cells = engine_cells.of_part("reward")
    theirs = [
        row(c, reward_last=r)
        for c, r in zip([c for c in cells if c.engine == "trl"], (0.5, 0.6, 0.7), strict=True)
    ]
    ours = [row(c, reward_last=0.51) for c in cells if c.engine == "ours"]
    assert engine_summary.reward_bar([*ours, *theirs]).met is True
    low = [r | {"reward_last": "0.49"} for r in ours]
    assert engine_summary.reward_bar([*low, *theirs]).met is False
    assert engine_summary.reward_bar(ours).met is None


def test_the_cost_of_ppo_is_told_beside_its_passes() -> None:
    cells = engine_cells.of_part("cost")[:2]
    rows = [
        row(c, cpu_s_per_1000=s, token_passes=n)
        for c, s, n in zip(cells, (60, 10), (5000, 1000), strict=True)
    ]
    assert engine_summary.cost_bar(rows).measured == "bundled 6.0x (token passes 5.0x)"


def test_the_report_is_of_one_run() -> None:
    old = [r | {"run": "old"} for r in measured(1000, 1000)]
    rows = [*old, *measured(100, 1200)]
    said = engine_summary.report(rows)
    assert "12.0x" in said and "1.0x" not in said.replace("12.0x", "")
    assert "not met" in engine_summary.report(rows, "old")
    assert engine_summary.report(rows, "never") == "no rows of this run"
    variant = replace(CELL, part="ablation", variant="no-tree")
    both = [
        row(replace(variant, variant="full"), cpu_s_per_1000=50, peak_mb_above_import=100),
        row(variant, cpu_s_per_1000=125, peak_mb_above_import=100),
    ]
    assert "| no-tree | 125.0 | 2.50 | 100 | 1.00 |" in engine_summary.report(both)


# ---- what is set up


def test_synthetic_prompts_share_what_they_should() -> None:
    cell = Cell("scaling", "ours", "ppo", "tiny", "synthetic", 3, length=40, shared=75)
    rows = engine_setup.prompts(cell, Path(), None, 2)
    assert len(rows) == 6 and {len(r["ids"]) for r in rows} == {40}
    assert len({tuple(r["ids"][:30]) for r in rows}) == 1
    assert len({r["ids"][30] for r in rows}) > 1 and len({r["text"] for r in rows}) == 6


def test_the_thirty_million_llama_has_as_many_weights() -> None:
    """Embedding and head 2 · 32,000 · 320; each of 8 blocks 4 · 320² + 3 · 320 · 864, 2 norms."""
    from transformers import LlamaForCausalLM

    config = engine_setup.shape_config("llama30")
    count = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    blocks = 8 * (4 * 320**2 + 3 * 320 * 864)
    assert count == 2 * 32000 * 320 + blocks + 17 * 320 == 30_397_760
    size = Size.of(engine_setup.SHAPES["llama30"])
    assert (size.blocks, size.head) == (blocks, 32000 * 320)
    # As counted in a run: LoRA r 16 on the seven linears of each block.
    assert size.lora == 8 * 16 * (4 * 640 + 3 * 1184) == 782_336


def test_rivals_see_no_packages_of_ours(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert engine_setup.environment(1)["PYTHONPATH"] == str(ROOT)
    assert engine_setup.environment(1)["OMP_NUM_THREADS"] == "1"
    assert engine_setup.environment(0, True)["PYTHONPATH"].endswith("/elsewhere")
    assert "OMP_NUM_THREADS" not in engine_setup.environment(0)


# ---- the roofline


def test_passes_of_a_step_by_hand() -> None:
    """Blocks 100, head 10, LoRA 2, attention 3, cache 4; two prompts of 4 tokens of which 2 are
    shared, answers of 2. Tokens: 2 + 2 · 2 = 6, with one more an answer 8. Pairs: 3 for the shared
    two, (2 + 2 + 3) for each own part, 5 for each answer's token: 17, then 27."""
    cell = Cell("gpu", "ours", "ppo", "tiny", "synthetic", 2, tokens=2, length=4, shared=50)
    size = Size(100, 10, 2, 3, 4)
    prefill, decode, score, reference, update = passes(size, cell, epochs=4, number=2)
    pairs = 3 + 2 * (2 * 2 + 3)
    assert prefill.flops == 2 * (6 * 102 + 2 * 10) + 4 * pairs * 3
    assert prefill.bytes == 220
    assert decode.times == 1
    assert decode.flops == 2 * (2 * 102 + 2 * 10) + 4 * 10 * 3
    assert decode.bytes == 220 + 2 * 4 * (6 + 2)
    whole = pairs + 2 * 5
    assert score.flops == 2 * (8 * 102 + 4 * 10) + 4 * whole * 3
    assert reference.flops == 2 * (8 * 100 + 4 * 10) + 4 * whole * 3
    # Backward: 2 for frozen weights, 4 for LoRA, 8 for a pair.
    backward = 2 * (8 * 100 + 4 * 10) + 4 * 8 * 2 + 8 * whole * 3
    assert (update.times, update.flops) == (4, score.flops + backward)
    assert update.bytes == 440 + 28 * 2
    assert [p.name for p in passes(size, cell, recompute=False)][2] == "reference"


def test_a_pass_takes_the_longer_of_its_two_times() -> None:
    one = engine_roofline.Pass("decode", 3, flops=100.0, bytes=50.0)
    assert one.seconds(gemm=10.0, copy=50.0) == 30.0
    assert one.seconds(gemm=1000.0, copy=25.0) == 6.0


def test_bars_of_a_gpu_take_the_newest_rows() -> None:
    base = {"shape": "s", "method": "ppo"}
    rows = [
        base | {"engine": "ours", "times_roofline": "9", "step_s": "9"},
        base | {"engine": "ours", "times_roofline": "1.9", "step_s": "1"},
        base | {"engine": "trl", "times_roofline": "40", "step_s": "4"},
    ]
    assert engine_roofline.verdict(rows) == [
        "s: 1.90x the roofline, asked ≤ 2x: met",
        "s: 4.0x TRL's PPO, asked ≥ 5x: not met",
    ]


def test_the_program_for_a_gpu_runs_on_a_tiny_shape(tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "engine_roofline.py"
    table = tmp_path / "rows.csv"
    command = [
        sys.executable, str(program), "--shapes", "tiny", "--device", "cpu", "--dtype", "float32",
        "--prompts", "2", "--length", "24", "--tokens", "3", "--steps", "1", "--methods", "ppo",
        "--engines", "ours", "--csv", str(table), "ppo.epochs=1",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = csv.DictReader(table.read_text().splitlines())
    assert found["shape"] == "tiny" and float(found["step_s"]) > 0
    assert "the roofline, asked" in done.stdout
    wrong = subprocess.run([*command, "--shared", "100"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "below 100" in wrong.stderr


# ---- an engine's process


@pytest.mark.parametrize("stop", ["equal", "natural"])
def test_a_cell_of_ours_leaves_its_clock_and_tokens(tmp_path: Path, stop: str) -> None:
    cell = Cell("gpu", "ours", "ppo", "tiny", "synthetic", 2, stop=stop, length=20, shared=50)
    job = {f: getattr(cell, f) for f in cell.__dataclass_fields__} | {
        "kind": "ppo", "shape": "tiny", "device": "cpu", "dtype": "float32", "threads": 1,
        "profile": False, "out": str(tmp_path / "out.json"),
    }  # fmt: skip
    rows = engine_setup.synthetic(cell, 2)
    result, _ = engines.run_job(job, rows, Path(sys.executable), tmp_path, "a cell")
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert len(result["clocks"]) == 3 and result["peak_mb"] > result["import_mb"] > 0
    assert result["prompt_tokens"] == 20
    assert result["answer_tokens"] == 8 if stop == "equal" else result["answer_tokens"] <= 8


def test_what_a_failed_cell_said_is_shown(tmp_path: Path, capsys) -> None:
    job = {"engine": "ours", "kind": "nothing", "device": "cpu", "threads": 1, "seed": 0,
           "out": str(tmp_path / "out.json")}  # fmt: skip
    with pytest.raises(subprocess.CalledProcessError):
        engines.run_job(job, [], Path(sys.executable), tmp_path, "a cell")
    assert "KeyError: 'nothing'" in capsys.readouterr().err
