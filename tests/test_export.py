"""Export of a run, and how programs end: the folders are loaded by peft and transformers alone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ends, raiser
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppo_nlu import export
from ppo_nlu.config import LoraConfig, dump, load_config
from ppo_nlu.errors import UserError
from ppo_nlu.model import lora, peft_format
from ppo_nlu.runtime import checkpoint, cli, run_folder

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[11, 42, 7, 99, 3, 64, 128, 5]])
LORA = LoraConfig(r=2, alpha=8.0)


def save_base(folder: Path) -> None:
    """A random one-layer Qwen2 with tied embeddings and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<eos>": 256}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    config = transformers.Qwen2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=257, max_position_embeddings=256, eos_token_id=256,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def policy(base: Path, seed: int) -> Any:
    """The base with LoRA weights as if trained; another seed, another policy."""
    model = load(base)
    lora.attach(model, LORA)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


FINAL, BEST, LAST = 1, 2, 3  # the seeds of the three policies in the run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run folder as training leaves it, with three different policies in it."""
    given = tmp_path / "given.yaml"
    given.write_text(
        f"task: sst2\nmodel: {{name_or_path: {base}, device: cpu}}\nlora: {{r: 2, alpha: 8}}\n"
    )
    folder = tmp_path / "run"
    run_folder.claim(folder, dump(load_config(given))).release()
    peft_format.save_adapter(policy(base, FINAL), folder / "adapter", LORA, "somewhere/else")
    save_file({"out.bias": torch.tensor([0.5])}, folder / "adapter" / export.VALUE_HEAD)

    def groups(seed: int) -> checkpoint.Tensors:
        head = {"out.bias": torch.tensor([float(seed)])}
        return {"adapter": lora.state_dict(policy(base, seed)), "value_head": head}

    checkpoint.save_best(folder, 5, 0.9, groups(BEST), {})
    checkpoint.save(folder, 7, groups(BEST), {})
    checkpoint.save(folder, 9, groups(LAST), {})
    return folder


def export_to(run: Path, *options: str) -> Path:
    output = run.parent / "out" / "exported"
    assert export.main([str(run), "--output", str(output), *options]) == 0
    left = [p.name for p in output.parent.iterdir()]
    assert left == ["exported"], "no temporary folder stays behind"
    return output


def by_readme(folder: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> dict[str, Any]:
    """What the README's Python lines define, run as it says from within the folder, with the base
    where they look for it."""
    (folder / base.name).symlink_to(base)
    monkeypatch.chdir(folder)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    names: dict[str, Any] = {}
    exec(code, names)
    return names


# ---- the adapter -----------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "seed"), [(None, FINAL), ("best", BEST), ("last", LAST)])
def test_readme_loads_the_adapter_with_peft(
    run: Path, base: Path, which: str | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    output = export_to(run, *(["--checkpoint", which] if which else []))
    model = by_readme(output, monkeypatch, base)["model"]
    assert gap(logits(model), logits(policy(base, seed))) <= 1e-5
    assert gap(logits(model), logits(load(base))) > 1e-3
    head = load_file(output / export.VALUE_HEAD)["out.bias"]
    assert head.item() == (0.5 if which is None else seed)


def test_an_export_does_not_tell_the_machines_path_of_its_base(run: Path, base: Path) -> None:
    output = export_to(run)
    config = json.loads((output / peft_format.CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == base.name
    assert config["r"] == 2 and config["lora_alpha"] == 8.0
    for path in output.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path.name


def test_base_name_of_the_bundled_model_and_of_the_hub(run: Path) -> None:
    for name in ("bundled", "owner/name", "models/base"):
        cfg = load_config(run / "config.yaml", [f"model.name_or_path={name}"])
        assert export.base_name(cfg) == name


def test_the_readme_of_the_bundled_model_finds_it_by_itself(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    output = tmp_path / "out"
    assert export.main([str(finished_run), "--output", str(output)]) == 0
    assert by_readme(output, monkeypatch, tmp_path)["model"] is not None


# ---- merged ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "seed"), [(None, FINAL), ("best", BEST), ("last", LAST)])
def test_merged_folder_is_the_policy(
    run: Path, base: Path, which: str | None, seed: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = export_to(run, "--merge", *(["--checkpoint", which] if which else []))
    assert str(base.parent) not in "".join(
        path.read_text() for path in output.iterdir() if path.suffix in (".json", ".md")
    )
    names = by_readme(output, monkeypatch, base)
    assert gap(logits(names["model"]), logits(policy(base, seed))) <= 1e-4
    assert gap(logits(names["model"]), logits(load(base))) > 1e-3
    text = "a film ."
    want = transformers.AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    assert names["tokenizer"](text)["input_ids"] == want
    printed = capsys.readouterr().out
    figure = float(printed.split("largest difference of the logits ")[1].split()[0])
    assert 0 <= figure <= 1e-4


def test_merged_weights_keep_the_dtype(run: Path) -> None:
    output = export_to(run, "model.dtype=bfloat16", "--merge")
    tensors = load_file(output / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors, "tied"


def test_a_merge_that_changes_the_model_is_not_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any) -> Any:
        merged = right(model)
        with torch.no_grad():
            merged.model.layers[0].mlp.up_proj.weight[0, 0] += 0.05
        return merged

    right = lora.merge
    monkeypatch.setattr(lora, "merge", wrong)
    output = run.parent / "out"
    with pytest.raises(UserError, match="logits differ from the policy's: largest difference"):
        export.main([str(run), "--output", str(output), "--merge"])
    assert not output.exists()
    assert not list(run.parent.glob(".tmp*"))


# ---- what is refused -------------------------------------------------------------------------


def refused(words: str, *argv: str | Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        export.main([str(a) for a in argv])
    assert "\n" not in str(error.value)


def test_refuses_an_output_in_use(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    for merge in ([], ["--merge"]):
        refused("is not empty", run, "--output", output, *merge)
    refused("is a file", run, "--output", output / "mine.txt")
    refused("cannot be made", run, "--output", output / "mine.txt" / "below")
    assert [p.name for p in output.iterdir()] == ["mine.txt"]
    assert (output / "mine.txt").read_text() == "mine"


def test_an_empty_output_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "exported").mkdir()
    assert (export_to(run) / peft_format.WEIGHTS_FILE).is_file()


def test_refuses_what_is_no_finished_run(run: Path, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    refused("no such run folder", tmp_path / "nowhere", "--output", output)
    refused("not a run folder", base, "--output", output)
    refused("unknown key|rr", run, "--output", output, "lora.rr=3")
    (run / "adapter").rename(run / "elsewhere")
    for merge in ([], ["--merge"]):
        refused("no adapter/.*--checkpoint last", run, "--output", output, *merge)
    (run / "checkpoints").rename(run / "gone")
    for which in ("best", "last"):
        refused(f"no {which} checkpoint", run, "--output", output, "--checkpoint", which)
    assert not output.exists() and not list(tmp_path.glob(".tmp*"))


def test_refuses_a_checkpoint_without_lora(run: Path) -> None:
    checkpoint.save(run, 11, {"value_head": {"out.bias": torch.zeros(1)}}, {})
    refused("holds no LoRA", run, "--output", run.parent / "out", "--checkpoint", "last")


def test_refuses_a_damaged_adapter(run: Path) -> None:
    path = run / "adapter" / peft_format.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:100])
    for merge in ([], ["--merge"]):
        refused("damaged", run, "--output", run.parent / "out", *merge)


# ---- how programs end ------------------------------------------------------------------------


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(lambda: 0) == 0
    assert ends(lambda: None) == 0
    assert ends(lambda: 143) == 143
    assert ends(raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""
    assert ends(raiser(UserError("a.yaml: ppo.clip is -1;\nmake it positive"))) == 2
    assert capsys.readouterr().err == "error: a.yaml: ppo.clip is -1; make it positive\n"
    assert ends(raiser(OSError(errno.ENOSPC, "No space left on device", "runs/x"))) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: disk full: runs/x") and err.count("\n") == 1
    with pytest.raises(SystemExit):
        ends(raiser(SystemExit(2)))


def test_arguments_reach_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["program", "a", "b=1"])
    assert cli.run(lambda argv: seen.append(argv)) == 0
    assert seen == [["a", "b=1"]]


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_error(lines: int) -> None:
    """A long output fails in print, a short one only when the buffer is flushed."""
    code = (
        "import sys; from ppo_nlu.runtime import cli\n"
        f"sys.exit(cli.run(lambda argv: sys.stdin.readline() and print('line\\n' * {lines})))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.close()
    child.stdout = None
    _, error = child.communicate("go\n", timeout=60)
    assert (child.returncode, error) == (0, "")


@pytest.mark.slow
def test_the_program_from_the_shell(run: Path) -> None:
    argv = [sys.executable, "-m", "ppo_nlu.export", str(run), "--output", str(run)]
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: --output: {run} is not empty; name a new folder\n"
