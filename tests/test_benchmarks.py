"""The benchmarks: their formulas by hand, what they time is right, the programs run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    before_after,
    cases,
    goals,
    gpu_checks,
    kernels,
    label_scores,
    lora_variants,
    rivals,
    timing,
)
from benchmarks.cases import Case  # noqa: E402
from ppo_nlu.tasks import Example, get_task  # noqa: E402

TINY = {
    "linear_logprobs": "6x16x50",
    "token_logprobs": "6x50",
    "lora_linear": "6x16x24x4",
    "lora_linear_grouped": "6x16x24+8x4",
    "gae": "3x9",
    "ppo_loss": "3x9",
}


def case_of(kernel: str, mode: str = "forward", shape: str | None = None) -> Case:
    return Case(kernel, cases.parse_sizes(shape or TINY[kernel]), "fp32", mode)


ALL = [(kernel, mode) for kernel in cases.KERNELS for mode in cases.modes_of(kernel)]


# ---- formulas


def test_work_of_log_probs_by_hand() -> None:
    """T=2, H=3, V=5: one product is 2·2·3·5 = 60 FLOPs; W 15, h 6 and dh 6 numbers of 4 bytes;
    for each row a target of 8 bytes, two outputs and the upstream numbers of 4."""
    forward, both, entropy = (
        cases.work(case_of("linear_logprobs", mode, "2x3x5")) for mode in cases.MODES
    )
    assert (forward.flops, forward.bytes) == (60, 4 * (15 + 6) + 2 * 16)
    assert (both.flops, both.bytes) == (120, 4 * (15 + 12) + 2 * 20)
    assert (entropy.flops, entropy.bytes) == (180, 4 * (15 + 12) + 2 * 24)
    rows = cases.work(case_of("token_logprobs", "forward+backward", "2x5"))
    assert (rows.flops, rows.bytes) == (0, 3 * 4 * 10 + 2 * 20)  # read, read again, written


def test_work_of_lora_is_that_of_the_published_table() -> None:
    """4096 → 4096, r=16, T=2048: 0.54 GFLOP beside the base product, 67 MB; T=8192: 168 MB."""
    for rows, megabytes in ((2048, 67), (8192, 168)):
        case = Case("lora_linear", (rows, 4096, 4096, 16), "bf16", "forward")
        base = 2 * rows * 4096 * 4096
        assert cases.work(kernels.bare(case)).flops == base
        assert cases.work(case).flops - base == 2 * rows * 16 * 8192
        assert round(cases.work(case).bytes / 1e6) == megabytes


def test_work_of_lora_backward_by_hand() -> None:
    """T=2, K=3, O=5, r=1: products 2·2·15 twice; low-rank 2·2·(3+5) once forward, twice backward.

    Numbers: forward x 6, W 15, A and B 8, y 10; backward dy 10, x 6, W 15, A and B 8 read,
    dx 6, dA and dB 8 written.
    """
    done = cases.work(case_of("lora_linear", "forward+backward", "2x3x5x1"))
    assert done.flops == 2 * 60 + 3 * 32
    assert done.bytes == 4 * (6 + 15 + 8 + 10 + 10 + 6 + 15 + 8 + 6 + 8)


def test_a_group_reads_x_once() -> None:
    """Two layers 3 → 5 of one x: 2·15 for both W, 2·8 for both A and B, x 6 and both y 20."""
    done = cases.work(case_of("lora_linear_grouped", "forward", "2x3x5+5x1"))
    assert done.bytes == 4 * (30 + 16 + 6 + 20)
    assert done.flops == 2 * (60 + 32)


def test_shapes_as_text() -> None:
    assert cases.parse_sizes("512x896x896+128x16") == (512, 896, (896, 128), 16)
    assert cases.fits("lora_linear_grouped", (512, 896, (896, 128), 16))
    assert not cases.fits("lora_linear", (512, 896, (896, 128), 16))
    with pytest.raises(ValueError, match="512y3"):
        cases.parse_sizes("512y3")


# ---- what is timed


@pytest.mark.parametrize(("kernel", "mode"), ALL)
def test_providers_compute_the_same(kernel: str, mode: str) -> None:
    """All that runs without compiling agrees with float64, here in fp32."""
    inputs = cases.prepare(case_of(kernel, mode), "cpu")
    here = [p for p in rivals.PROVIDERS if p.applies(inputs) and not p.missing("cpu")]
    tried = [p for p in here if p.name not in ("limit", "compile")]
    assert {"ours"} < {p.name for p in tried}
    for p in tried:
        assert cases.error(inputs, p.make(inputs)()) < 2e-5, p.name


def test_the_addmm_form_has_the_gradients_of_autograd() -> None:
    inputs = cases.prepare(case_of("lora_linear_grouped", "forward+backward"), "cpu")
    for ours, theirs in zip(rivals.unsloth_form(inputs)(), rivals.naive(inputs)(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", cases.KERNELS)
def test_a_wrong_result_is_seen(kernel: str) -> None:
    inputs = cases.prepare(case_of(kernel), "cpu")
    right = cases.reference(inputs)
    shifted = (
        [right + 1e-2] if kernel != "lora_linear_grouped" else right.add(1e-2).split([24, 8], 1)
    )
    assert cases.error(inputs, shifted) > 1e-3


def test_the_small_check_passes_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {kernel: [shape] for kernel, shape in TINY.items()}
    monkeypatch.setattr(gpu_checks, "SMALL_SHAPES", shapes)
    assert gpu_checks.main(["--small", "--device", "cpu"]) == 0
    monkeypatch.setattr(gpu_checks, "error_bar", lambda case: -1.0)
    assert gpu_checks.main(["--small", "--device", "cpu"]) == 1
    assert "WRONG gae" in capsys.readouterr().out


# ---- timing


def test_percentiles_and_rotation() -> None:
    taken = timing.summarize([(float(n), 0.5) for n in range(11)])
    assert (taken.p20, taken.p50, taken.p80, taken.cpu, taken.repeats) == (2, 5, 8, 0.5, 11)
    seen: list[str] = []
    sets = [lambda: seen.append("first"), lambda: seen.append("second")]
    timing.time_interleaved({"a": sets}, "cpu", repeats=2)
    assert {"first", "second"} == set(seen)


def test_a_slow_callable_takes_part_in_fewer_rounds() -> None:
    calls = {"slow": [lambda: timing.time.sleep(0.02)], "fast": [lambda: None]}
    taken = timing.time_interleaved(calls, "cpu", repeats=9, seconds_each=0.01)
    assert taken["slow"].repeats == timing.FEWEST
    assert taken["fast"].repeats == 9


def test_peak_memory_is_exact() -> None:
    """1 MiB held and freed, then 2 MiB, of which the result is part."""

    def call() -> torch.Tensor:
        torch.empty(1 << 18)
        return torch.empty(1 << 19)

    assert timing.peak_mib(call, "cpu") == 2.0


# ---- the program


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of the program with one rival package missing: its rows and what it printed."""
    path = tmp_path_factory.mktemp("benchmark") / "rows" / "kernels.csv"
    shapes = [f"{kernel}:{shape}" for kernel, shape in TINY.items()]
    command = ["--shapes", *shapes, "--repeats", "1", "--csv", str(path), "--device", "cpu"]
    command += ["--against", "naive", "addmm", "cce", "python-loop"]
    program = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *command]
    done = subprocess.run(program, capture_output=True, text=True, cwd=path.parents[1], timeout=120)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@pytest.mark.slow
def test_rows_have_all_columns(run: tuple[Path, str]) -> None:
    with run[0].open(newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    assert tuple(table.fieldnames or ()) == kernels.COLUMNS
    may_be_empty = {"error", "error_kind", "rival", "triton"}
    for row in rows:
        assert all(row[name] for name in set(kernels.COLUMNS) - may_be_empty), row
        assert (row["error"] == "") == (row["provider"] == "limit")
    assert {(r["kernel"], r["mode"]) for r in rows if r["provider"] == "ours"} == {
        (kernel, mode) for kernel, mode in ALL if mode in cases.MODES[:2]
    }
    assert {r["percent_of_limit"] for r in rows if r["provider"] == "limit"} == {"100.0"}
    assert {json.loads(r["shape"])["V"] for r in rows if r["kernel"] == "linear_logprobs"} == {50}


@pytest.mark.slow
def test_what_is_left_out_is_named(run: tuple[Path, str]) -> None:
    named = [line for line in run[1].splitlines() if line.startswith("left out")]
    assert any("Triton kernels, which need CUDA" in line for line in named)
    assert any("cce (" in line for line in named)
    assert not any("AttributeError" in line for line in named)


@pytest.mark.slow
def test_rows_are_shown_and_drawn(run: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ratios.png"
    assert kernels.main(["--rows", str(run[0]), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.slow
def test_resume_leaves_out_what_was_measured(
    run: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--kernel", "gae", "--shapes", TINY["gae"], "--csv", str(run[0]), "--device", "cpu"]
    assert kernels.parse([*args, "--resume"]).cases == []
    assert len(kernels.parse(args).cases) == 1
    for wrong in (["--shapes", "1x2x3"], ["--against", "nobody"], ["--write-table"]):
        with pytest.raises(SystemExit, match="2"):
            kernels.parse(["--device", "cpu", "--kernel", "gae", *wrong])
    assert "fits none of: gae" in capsys.readouterr().err


@pytest.mark.slow
def test_the_summary_holds_what_lies_there(run: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "kernels.csv").write_bytes(run[0].read_bytes())
    (tmp_path / "stages.csv").write_text("stage,result,seconds\ntests,ok,3\n")
    (tmp_path / "goals.md").write_text(goals.markdown([goals.within("G9", "gae", 9.0, 15.0, "us")]))
    assert gpu_checks.main(["--summary", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "summary.md").read_text()
    for part in ("| tests | ok | 3 |", "| G9 | gae | 9 us | ≤ 15 us | yes |", "| addmm |"):
        assert part in text


# ---- goals, variants, the script


def test_goals_compare_with_their_bars() -> None:
    found = {name: {"p50_ms": text} for name, text in (("ours", "2.0"), ("peft", "3.0"))}
    assert goals.over(found, "ours", "peft") == pytest.approx(2 / 3)
    assert goals.over(found, "ours", "liger-flsce") is None
    (beaten,) = goals.beats("G7", found, {"peft": 1.3, "compile": 1.15})
    assert beaten.met is True and beaten.measured == "1.5 ×"
    assert goals.within("G5", "", 0.9, 0.89, "ms").met is False
    assert goals.within("G5", "", 2.7, 2.8, "TB/s", most=False).met is False
    assert goals.within("G1", "", None, 1.1).met is None


def test_a_variant_must_win_beyond_the_spread() -> None:
    def timed(p20: float, p50: float, p80: float) -> timing.Timing:
        return timing.Timing(p20, p50, p80, 0.0, 30)

    times = {"cublas": timed(0.9, 1.0, 1.1), "fused": timed(0.7, 0.8, 0.95)}
    assert lora_variants.faster(times, "cublas") == "cublas"
    times["extended"] = timed(0.7, 0.8, 0.85)
    assert lora_variants.faster(times, "cublas") == "extended"
    times[lora_variants.ROOMY] = timed(0.1, 0.1, 0.1)  # not what the table is asked for
    assert lora_variants.faster(times, "cublas") == "extended"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_the_gpu_script_refuses_without_cuda(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
    assert gpu_checks.main(["--output", str(tmp_path)]) == 2


def test_the_gpu_script_goes_on_after_a_failed_stage(tmp_path: Path) -> None:
    """With a stand-in for Python that claims a GPU and fails the tests: all stages run."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in *"-m pytest"*) exit 3 ;; *--goals*) sleep 30 ;; *) echo "ran $*" ;; esac\n'
    )
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "GPU_SECONDS": "600"}
    patched = (ROOT / "benchmarks" / "gpu.sh").read_text().replace("goals 45", "goals 5")
    script = tmp_path / "benchmarks" / "gpu.sh"
    script.parent.mkdir()
    script.write_text(patched)
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(script), str(out)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 1, done.stderr
    stages = dict(line.split(",")[:2] for line in (out / "stages.csv").read_text().splitlines())
    assert stages["tests"] == "failed (3)" and stages["goals"] == "out of time"
    assert stages["checks"] == stages["summary"] == "ok"


# ---- one run, before and after


def test_the_interval_of_an_accuracy_is_that_of_the_binomial() -> None:
    binom = pytest.importorskip("scipy.stats").binom
    for accuracy, count in ((0.5, 100), (0.18, 200), (0.82, 200)):
        exact = [binom.ppf(q, count, accuracy) / count for q in (0.025, 0.975)]
        found = before_after.interval(accuracy, count)
        assert found == pytest.approx(exact, abs=1.5 / count)
    assert before_after.interval(1.0, 7) == (1.0, 1.0)


def test_the_rows_of_a_run_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = {"greedy": 1.0, "score": 0.0, "unparsed": 0.0}
    summary = {
        "model": "/somewhere/model", "task": "sst2", "tasks": {"sst2": {"title": "SST-2"}},
        "eval_split": "dev", "eval_rows": 4, "seed": 3, "train_samples": 32.0, "train_s": 7.6,
        "before": {"sample": 0.0, **scores}, "after": {"sample": 1.0, **scores},
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    steps = [
        {"step": step, "reward/mean": reward, "time/step_s": step}
        for step, reward in ((1, -0.5), (2, 0.25))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    rows = before_after.rows_of(tmp_path)
    assert rows[:3] == [
        ("reward", "1", "-0.5000", "", ""),
        ("reward", "2", "0.2500", "", ""),
        ("base", "sample", "0.0000", "0.0000", "0.0000"),
    ]
    assert ("tuned", "sample", "1.0000", "1.0000", "1.0000") in rows
    assert ("fact", "model", "model", "", "") in rows
    assert ("fact", "median_step_s", "1.5", "", "") in rows
    names = ("part", "name", "value", "low", "high")
    before_after.draw([dict(zip(names, row, strict=True)) for row in rows], tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text(encoding="utf-8")


def test_the_committed_picture_has_its_rows_and_is_small() -> None:
    with before_after.ROWS.open(newline="", encoding="utf-8") as file:
        parts = [row["part"] for row in csv.DictReader(file)]
    assert parts.count("base") == parts.count("tuned") == 3 and parts.count("reward") == 20
    assert before_after.PICTURE.stat().st_size < 100_000


# ---- the scores of labels


def test_choices_between_labels_by_hand() -> None:
    """Behind no text, then behind one: labels of 1 and 3 tokens. Sums -2 and -2.4; means -2 and
    -0.8; less the prior -2 + 1 = -1 and -2.4 + 3 = 0.6."""
    without, row = [[-1.0, 0, 0], [-2.0, -0.5, -0.5]], [[-2.0, 0, 0], [-2.0, -0.2, -0.2]]
    mask = torch.tensor([[[True, False, False], [True] * 3]] * 2)
    best = label_scores.choices(torch.tensor([without, row]), mask)
    assert {how: found.tolist() for how, found in best.items()} == {
        "sum": [0],
        "mean": [1],
        "prior": [1],
    }
    spec = get_task("sst2")
    rows = [Example("0", {"sentence": "good"}, spec.words[0], "sst2")]
    measured = label_scores.measure(spec, rows, "mean", [1])
    assert (measured["accuracy"], measured["most_frequent"]) == ("0.0000", spec.words[1])
    first, second = label_scores.by_label(spec, rows, torch.tensor([without, row]), mask, best, 1)
    assert (first["tokens"], first["sum"], first["answered_sum"], first["right"]) == (
        0,
        "-2.00",
        1,
        1,
    )
    assert (second["tokens"], second["others"], second["tag"]) == (2, "-0.20", "-0.20")
    assert (second["per_token"], second["without_text"]) == ("-0.80", "-3.00")
