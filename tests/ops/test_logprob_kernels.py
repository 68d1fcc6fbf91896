"""The log-probability kernels against float64 formulas; without CUDA in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so there this file runs itself once more
in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, INTERPRETED, RUNS_KERNELS, run_interpreted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_nlu import ops

pytest.importorskip("triton")

# Frobenius of dh; the interpreter's casts to bf16 truncate, which is one unit in the last place.
DH = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
PATHS = ("chunks", "online")


def plain(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(logits.double() / temperature, dim=-1)
    terms = (log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0.0)
    return log_p.gather(1, targets[:, None])[:, 0], -terms.sum(-1)


def relative(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-12))


def leaf(t: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return t.detach().to(dtype).requires_grad_()


def head(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
    hidden = leaf(torch.randn(rows, width, device=DEVICE), dtype)
    weight = (scale * torch.randn(vocab, width, device=DEVICE) / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    targets[:2] = torch.tensor([0, vocab - 1], device=DEVICE)[:rows]
    return hidden, weight, targets


def linear(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """The kernel itself, where `path` is given; otherwise the public function."""
    from ppo_nlu.kernels import linear_logprobs as module

    return (module if "path" in kwargs else ops).linear_logprobs(*args, **kwargs)


def close(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], atol: float = 1e-5) -> None:
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=1e-5)


def grads(loss: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.fixture(autouse=True)
def _ready(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if INTERPRETED or DEVICE == "cuda":
        monkeypatch.setenv("PPO_NLU_BACKEND", "triton")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 entries and chunks of 8 rows: many odd remainders at little cost."""
    from ppo_nlu.kernels import linear_logprobs, online_logprobs, token_logprobs

    for module in (token_logprobs, linear_logprobs):
        monkeypatch.setattr(module, "block_and_warps", lambda vocab: (64, 4))
    monkeypatch.setattr(linear_logprobs, "MAX_ROWS", 8)
    small = online_logprobs.Tiles(16, 32, 16, 4, 2)
    monkeypatch.setattr(online_logprobs, "tiles", lambda rows, bytes_each: small)
    monkeypatch.setattr(online_logprobs, "_processors", lambda device: 3)


class Spy:
    """A kernel that keeps the grids of its launches, and runs only on request."""

    def __init__(self, kernel: object, run: bool) -> None:
        self.kernel, self.run, self.grids = kernel, run, []

    def __getitem__(self, grid: tuple[int, ...]):
        self.grids.append(grid)
        return self.kernel[grid] if self.run else (lambda *args, **kwargs: None)


class Sizes(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.numel() * item.element_size())
        return out


class TokenCases:
    """token_logprobs, from logits. Collected as a test class where kernels can run here."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("vocab", [1, 127, 129, 5000])
    def test_token_logprobs(self, vocab: int, dtype: torch.dtype) -> None:
        logits = leaf(3 * torch.randn(3, vocab, device=DEVICE), dtype)
        exact = leaf(logits)
        targets = torch.tensor([0, vocab - 1, vocab // 2], device=DEVICE)
        bar = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-5)
        for temperature in (0.1, 1.0, 10.0):
            ours = ops.token_logprobs(logits, targets, temperature)
            theirs = plain(exact, targets, temperature)
            close(ours, theirs)
            for g, g_entropy in ((1.0, 0.0), (0.0, 1.0), (0.5, -2.0)):
                (a,) = grads((g * ours[0] + g_entropy * ours[1]).sum(), (logits,))
                (b,) = grads((g * theirs[0] + g_entropy * theirs[1]).sum(), (exact,))
                assert a.dtype == dtype
                assert (a - b).abs().max() <= bar * b.abs().max() + 1e-6

    @pytest.mark.parametrize("vocab", [32000, 50257, 129920, 151936, 152064])
    def test_token_logprobs_of_real_vocabularies(self, vocab: int) -> None:
        logits = leaf(3 * torch.randn(2, vocab, device=DEVICE), torch.bfloat16)
        exact = leaf(logits)
        targets = torch.tensor([0, vocab - 1], device=DEVICE)
        ours, theirs = ops.token_logprobs(logits, targets), plain(exact, targets)
        close(ours, theirs, 2e-5)
        assert (ours[0] < 0).all()  # verl 2656: padded columns gave log π > 0
        (a,), (b,) = (grads(o[0].sum(), (s,)) for o, s in ((ours, logits), (theirs, exact)))
        assert relative(a, b) < DH[torch.bfloat16]

    @pytest.mark.parametrize("level", [-1e3, 1e4])
    def test_the_level_of_the_logits_costs_no_digits(self, level: float) -> None:
        """A maximum started at 0 (verl, SkyRL 2141) is NaN here."""
        logits = level + torch.randn(2, 300, device=DEVICE).round(decimals=1)
        targets = torch.tensor([0, 299], device=DEVICE)
        close(ops.token_logprobs(logits, targets), plain(logits, targets))

    def test_forbidden_tokens(self) -> None:
        """A whole block at -inf, -inf at one target, all but the target at -inf."""
        logits = torch.randn(3, 9000, device=DEVICE)
        logits[0, :8192] = logits[1, 4096:8192] = -torch.inf
        logits[2, 1:] = -torch.inf
        logits = leaf(logits, torch.float32)
        targets = torch.tensor([8500, 5000, 0], device=DEVICE)
        ours = ops.token_logprobs(logits, targets)
        close(ours, plain(logits, targets))
        assert ours[0][1] == -torch.inf and ours[0][2] == 0.0
        (grad,) = grads(ours[0].sum() + ours[1].sum(), (logits,))
        assert grad.isfinite().all()

    def test_a_nan_is_not_hidden(self) -> None:
        logits = torch.zeros(1, 70, device=DEVICE).index_fill_(
            1, torch.tensor([5], device=DEVICE), torch.nan
        )
        logprobs, entropy = ops.token_logprobs(logits, torch.tensor([3], device=DEVICE))
        assert logprobs.isnan().all() and entropy.isnan().all()

    def test_fp16_logits_are_widened_before_scaling(self) -> None:
        logits = torch.tensor([[60000.0, 59968.0, -60000.0]], dtype=torch.float16, device=DEVICE)
        targets = torch.tensor([1], device=DEVICE)
        close(ops.token_logprobs(logits, targets, 0.5), plain(logits, targets, 0.5))

    def test_any_layout_of_logits(self) -> None:
        targets = torch.tensor([1, 20, 7, 0], device=DEVICE)
        for logits in (
            torch.randn(33, 4, device=DEVICE).T,
            torch.randn(1, 33, device=DEVICE).expand(4, 33),
            torch.randn(4 * 33 + 1, device=DEVICE)[1:].view(4, 33),  # base at an odd element
        ):
            logits = logits.requires_grad_()
            ours, theirs = ops.token_logprobs(logits, targets), plain(logits, targets)
            close(ours, theirs)
            (a,), (b,) = (grads(out[0].sum(), (logits,)) for out in (ours, theirs))  # stride 0
            assert relative(a, b) < 1e-5

    def test_row_offsets_past_2_31(self) -> None:
        """The last row starts at element 3 · 2^30; the memory between is never touched."""
        if DEVICE == "cuda":
            pytest.skip("needs 6 GB of lazily allocated memory")
        storage = torch.empty(3 * 2**30 + 40, dtype=torch.float16)
        logits = storage.as_strided((4, 33), (2**30, 1))
        logits.copy_(torch.randn(4, 33))
        targets = torch.tensor([1, 20, 7, 0])
        close(ops.token_logprobs(logits, targets), plain(logits, targets))

    def test_more_rows_than_a_second_grid_axis_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Liger 1294: rows on axis y stop at 65535. Here all rows lie on axis 0, and only there."""
        from ppo_nlu.kernels import linear_logprobs, online_logprobs, token_logprobs

        rows, spies = 70000, []
        for module, name in (
            (token_logprobs, "_forward"),
            (token_logprobs, "_backward"),
            (online_logprobs, "_partial"),
            (online_logprobs, "_merge"),
            (linear_logprobs, "_combine"),
        ):
            spies.append(Spy(getattr(module, name), run=False))
            monkeypatch.setattr(module, name, spies[-1])
        logits = torch.zeros(1, 3, device=DEVICE).expand(rows, 3).requires_grad_()
        hidden = torch.zeros(1, 2, device=DEVICE).expand(rows, 2).requires_grad_()
        targets = torch.zeros(rows, dtype=torch.long, device=DEVICE)
        ops.token_logprobs(logits, targets)[0].sum().backward()
        with torch.no_grad():
            linear(hidden, torch.zeros(3, 2, device=DEVICE), targets, path="online")
        linear_logprobs.launch_combine(torch.zeros(1, rows, 2, device=DEVICE), targets, None)
        assert all(spy.grids and all(len(g) == 1 for g in spy.grids) for spy in spies)
        assert spies[0].grids == spies[1].grids == spies[4].grids == [(rows,)]


class LinearCases:
    """linear_logprobs, from hidden states, by chunks or in one online kernel; and which is run."""

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("vocab", [1, 127, 129])
    @pytest.mark.usefixtures("narrow")
    def test_linear_logprobs_over_blocks_and_chunks(self, vocab: int, path: str) -> None:
        hidden, weight, targets = head(19, 20, vocab, scale=3.0)  # H is no multiple of BLOCK_K
        exact = leaf(hidden)
        for temperature in (0.1, 1.0, 10.0):
            ours = linear(hidden, weight, targets, None, temperature, path=path)
            theirs = plain(exact @ weight.double().T, targets, temperature)
            close(ours, theirs, 2e-5)
            (a,), (b,) = (grads(o[0].sum(), (s,)) for o, s in ((ours, hidden), (theirs, exact)))
            assert relative(a, b) < 1e-5 or vocab == 1
            with torch.no_grad():
                close(linear(hidden, weight, targets, None, temperature, path=path), theirs, 2e-5)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("rows", [0, 1, 127, 129])
    def test_any_number_of_rows(self, rows: int, path: str) -> None:
        hidden, weight, targets = head(rows, 8, 33)
        exact = leaf(hidden)
        ours = linear(hidden, weight, targets, path=path)
        theirs = plain(exact @ weight.double().T, targets)
        assert ours[0].shape == ours[1].shape == (rows,)
        close(ours, theirs)
        (a,), (b,) = (grads(o[0].sum(), (s,)) for o, s in ((ours, hidden), (theirs, exact)))
        assert a.shape == hidden.shape and (rows == 0 or relative(a, b) < 1e-5)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("vocab", [50257, 152064])
    def test_linear_logprobs_of_real_vocabularies(
        self, vocab: int, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """verl 2656: columns past V counted as exp(0), where V is no multiple of a block."""
        from ppo_nlu.kernels import online_logprobs

        if INTERPRETED:  # few, wide tiles
            wide = online_logprobs.Tiles(16, 8192, 16, 4, 2)
            monkeypatch.setattr(online_logprobs, "tiles", lambda rows, bytes_each: wide)
        monkeypatch.setattr(online_logprobs, "_processors", lambda device: 3)
        hidden, weight, targets = head(2, 5, vocab)
        weight -= 2.0 * hidden.detach().sign()[:1]  # most logits of row 0 far below 0
        with torch.no_grad():
            ours = linear(hidden, weight, targets, path=path)
        close(ours, plain(hidden.double() @ weight.double().T, targets))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("entropy_grad", [False, True])
    @pytest.mark.usefixtures("narrow")
    def test_a_frozen_head(self, entropy_grad: bool, path: str, dtype: torch.dtype) -> None:
        hidden, weight, targets = head(19, 40, 129, dtype, scale=4.0)
        bias = torch.randn(129, device=DEVICE, dtype=dtype)
        exact = leaf(hidden)
        kwargs = {"path": path, "entropy_grad": entropy_grad}
        ours = linear(hidden, weight, targets, bias, 0.8, **kwargs)
        theirs = plain(exact @ weight.double().T + bias.double(), targets, 0.8)
        close(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-4)
        for g, g_entropy in ((1.0, 0.0), (0.0, 1.0), (0.5, -2.0)):
            (a,) = grads((g * ours[0] + g_entropy * ours[1]).sum(), (hidden,))
            (b,) = grads((g * theirs[0] + g_entropy * theirs[1]).sum(), (exact,))
            assert a.dtype == dtype and relative(a, b) < DH[dtype]
            assert (a - b).abs().max() <= 2e-2 * b.abs().max()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.usefixtures("narrow")
    def test_a_head_that_learns(self, frozen: bool, lora: bool, dtype: torch.dtype) -> None:
        """LoRA on the head ignored (TRL 4612): here it counts, in values and gradients."""
        if frozen and not lora:
            pytest.skip("test_a_frozen_head")
        hidden, weight, targets = head(19, 12, 65, dtype)
        bias = torch.randn(65, device=DEVICE, dtype=dtype).requires_grad_(not frozen)
        weight.requires_grad_(not frozen)
        a, b = (leaf(torch.randn(*s, device=DEVICE) / 2, torch.float32) for s in ((3, 12), (65, 3)))
        sources = (hidden, *(() if frozen else (weight, bias)), *((a, b) if lora else ()))
        doubles = {id(t): leaf(t) for t in sources}
        h, w, c, low, high = (
            doubles.get(id(t), t.detach().double()) for t in (hidden, weight, bias, a, b)
        )
        exact = h @ w.T + c + (1.5 * (h @ low.T) @ high.T if lora else 0.0)
        kwargs = {"lora_a": a, "lora_b": b, "scaling": 1.5} if lora else {}
        ours = linear(hidden, weight, targets, bias, 0.8, path=None, **kwargs)
        theirs = plain(exact, targets, 0.8)
        close(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-4)
        with torch.no_grad():
            close(linear(hidden, weight, targets, bias, 0.8, path="online", **kwargs), theirs, 1e-4)
        ours_g = grads((0.5 * ours[0] - 2 * ours[1]).sum(), sources)
        theirs_g = grads((0.5 * theirs[0] - 2 * theirs[1]).sum(), tuple(doubles.values()))
        for x, y, source in zip(ours_g, theirs_g, sources, strict=True):
            assert x.dtype == source.dtype and relative(x, y) < DH[dtype]

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.usefixtures("narrow")
    def test_extreme_logits_from_hidden_states(self, path: str) -> None:
        """Level -1e3 and +1e4, a whole block (and more) at -inf, -inf at a target."""
        hidden, weight, targets = head(4, 8, 200)
        bias = torch.zeros(200, device=DEVICE)
        for level in (-1e3, 1e4):
            ours = linear(hidden, weight, targets, bias + level, path=path)
            # What fp32 holds of the logits at that level bounds what is left of their differences.
            close(ours, plain(hidden @ weight.T + level, targets), abs(level) * 5e-7 + 1e-5)
        bias[:150] = -torch.inf
        targets = torch.tensor([199, 160, 3, 170], device=DEVICE)
        ours = linear(hidden, weight, targets, bias, path=path)
        close(ours, plain(hidden @ weight.T + bias, targets))
        assert ours[0][2] == -torch.inf
        (grad,) = grads(ours[0].sum() + ours[1].sum(), (hidden,))
        assert grad.isfinite().all()

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.usefixtures("narrow")
    def test_a_large_fp16_logit(self, path: str) -> None:
        hidden = torch.full((2, 4), 200.0, device=DEVICE, dtype=torch.float16)
        weight = torch.tensor([[100.0], [99.9375], [-100.0]], device=DEVICE).expand(3, 4).half()
        targets = torch.tensor([0, 1], device=DEVICE)  # z = 80000, past the largest fp16
        with torch.no_grad():
            ours = linear(hidden, weight, targets, None, 50.0, path=path)
        close(ours, plain(hidden.double() @ weight.double().T, targets, 50.0), 1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_uniform_policy_keeps_its_mass(self, dtype: torch.dtype) -> None:
        """Gradient filtering (CCE) drops p < 2.4e-4, and fp16 has few digits for 1/151936."""
        hidden = leaf(torch.zeros(2, 4, device=DEVICE), dtype)
        weight = torch.ones(151936, 4, device=DEVICE, dtype=dtype)
        weight[0] = 2.0
        targets = torch.tensor([0, 0], device=DEVICE)
        linear(hidden, weight, targets)[0].sum().backward()
        exact = leaf(hidden)
        plain(exact @ weight.double().T, targets)[0].sum().backward()
        # The GEMM adds 151936 equal numbers in fp32, and their rounding does not average out: 5e-5
        # where it adds in blocks, some 4e-3 where it adds one by one, as on some processors.
        equal = torch.full((2, 151936), 1 / 151936, device=DEVICE, dtype=torch.float32)
        equal[:, 0] -= 1  # the target
        rounding = relative(equal @ weight.float(), equal.double() @ weight.double())
        assert relative(hidden.grad, exact.grad) < max(DH[dtype], 5e-5, 1.5 * rounding)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.usefixtures("narrow")
    def test_a_one_hot_policy_keeps_its_small_gradient(self, dtype: torch.dtype, path: str) -> None:
        """1 − p is about 1e-6: W_y − Σ p W with a rounded p would be nothing but rounding."""
        weight = torch.eye(8, device=DEVICE, dtype=dtype)
        hidden = torch.zeros(1, 8, device=DEVICE, dtype=dtype)
        hidden[0, 3] = 16.0
        hidden, targets = hidden.requires_grad_(), torch.tensor([3], device=DEVICE)
        exact = leaf(hidden)
        ours, theirs = (
            linear(hidden, weight, targets, path=path),
            plain(exact @ weight.double().T, targets),
        )
        torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-4, atol=0.0)
        (a,), (b,) = (grads(o[0].sum(), (s,)) for o, s in ((ours, hidden), (theirs, exact)))
        torch.testing.assert_close(a.double(), b, rtol=DH[dtype], atol=0.0)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.usefixtures("narrow")
    def test_any_layout_of_hidden_states_and_head(self, path: str) -> None:
        targets = torch.tensor([1, 20, 7, 0], device=DEVICE)
        for hidden, weight in (
            (torch.randn(16, 4, device=DEVICE).T, torch.randn(16, 33, device=DEVICE).T),
            (torch.randn(8, 33, device=DEVICE)[::2, 1::2], torch.randn(66, 16, device=DEVICE)[::2]),
            (torch.randn(1, 16, device=DEVICE).expand(4, 16), torch.randn(33, 16, device=DEVICE)),
            (
                torch.randn(65, device=DEVICE)[1:].view(4, 16),
                torch.randn(529, device=DEVICE)[1:].view(33, 16),
            ),
        ):
            hidden = hidden.requires_grad_()
            ours = linear(hidden, weight, targets, path=path)
            theirs = plain(hidden.double() @ weight.double().T, targets)
            close(ours, theirs)
            (a,), (b,) = (grads(out[0].sum(), (hidden,)) for out in (ours, theirs))
            assert relative(a, b) < 1e-5

    @pytest.mark.parametrize(
        "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    )
    def test_mixed_dtypes(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        hidden, weight, targets = head(3, 8, 33)
        hidden, weight = leaf(hidden, dtypes[0]), weight.to(dtypes[1])
        exact = leaf(hidden)
        ours, theirs = linear(hidden, weight, targets), plain(exact @ weight.double().T, targets)
        close(ours, theirs)
        (a,), (b,) = (grads(o[0].sum(), (s,)) for o, s in ((ours, hidden), (theirs, exact)))
        assert a.dtype == dtypes[0] and relative(a, b) < DH[dtypes[0]]

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("entropy_grad", [False, True])
    def test_backward_twice_and_no_double_backward(self, entropy_grad: bool, path: str) -> None:
        hidden, weight, targets = head(3, 8, 33)
        out = linear(hidden, weight, targets, path=path, entropy_grad=entropy_grad)
        loss = (out[0] * out[1]).sum()
        first, second = (grads(loss, (hidden,))[0] for _ in range(2))
        assert torch.equal(first, second)
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()

    @pytest.mark.parametrize("lora", [False, True])
    def test_autocast_lowers_nothing(self, lora: bool) -> None:
        """Also with the backward inside the region, where products would otherwise be in bf16."""
        from ppo_nlu.kernels.linear_logprobs import linear_logprobs

        hidden, weight, targets = head(3, 16, 33)
        inputs = (
            hidden,
            leaf(weight, torch.float32),
            *(
                leaf(torch.randn(*shape, device=DEVICE), torch.float32)
                for shape in ((2, 16), (33, 2))
            ),
        )
        h, w, a, b = (leaf(t) for t in inputs)
        inputs = inputs[: 4 if lora else 2]
        kwargs = {"lora_a": inputs[2], "lora_b": inputs[3]} if lora else {}
        with torch.autocast(DEVICE, enabled=False):
            ours = linear_logprobs(hidden, inputs[1], targets, **kwargs)
        with torch.autocast(DEVICE, torch.bfloat16):
            close(ops.linear_logprobs(hidden, inputs[1], targets), plain(h @ w.T, targets))
            ours_g = grads(ours[0].sum() + ours[1].sum(), inputs)
        theirs = plain(h @ w.T + ((h @ a.T) @ b.T if lora else 0.0), targets)
        close(ours, theirs)
        theirs_g = grads(theirs[0].sum() + theirs[1].sum(), (h, w, a, b)[: len(inputs)])
        for x, y in zip(ours_g, theirs_g, strict=True):
            assert relative(x, y) < 1e-5

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.usefixtures("narrow")
    def test_two_runs_are_bitwise_equal(self, path: str) -> None:
        hidden, weight, targets = head(19, 20, 129)
        runs = []
        for _ in range(2):
            out = linear(hidden, weight, targets, path=path, entropy_grad=True)
            runs.append((*out, *grads(out[0].sum() + out[1].sum(), (hidden,))))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("trainable", [False, True])
    def test_no_logits_of_all_rows_in_memory(
        self, trainable: bool, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ppo_nlu.kernels import linear_logprobs, online_logprobs

        monkeypatch.setattr(linear_logprobs, "BUDGET", 16 * 1000 * 4)
        monkeypatch.setattr(online_logprobs, "_processors", lambda device: 4)
        hidden, weight, targets = head(70, 8, 1000)
        weight.requires_grad_(trainable)
        with Sizes() as sizes:
            out = linear(hidden, weight, targets, path=path, entropy_grad=not trainable)
            if path == "online":
                assert sizes.largest < 70 * 1000 * 4 // 8  # the forward holds not even a chunk
            (out[0].sum() + out[1].sum()).backward()
        assert sizes.largest <= 2 * 16 * 1000 * 4  # D and Q of a chunk

    @pytest.mark.parametrize("target", [-1, 9, -100])
    def test_a_target_out_of_range_is_an_error(self, target: int) -> None:
        targets = torch.tensor([0, target], device=DEVICE)
        with pytest.raises(IndexError, match="out of range"):
            ops.token_logprobs(torch.randn(2, 9, device=DEVICE), targets)
        hidden, weight, _ = head(2, 4, 9)
        with pytest.raises(IndexError, match="out of range"):
            ops.linear_logprobs(hidden, weight, targets)
        for path in PATHS:  # unchecked, as in a CUDA graph: NaN, and no wild read
            with torch.no_grad():
                logprobs, _ = linear(hidden, weight, targets, path=path)
            assert logprobs[0].isfinite() and logprobs[1].isnan()

    def test_each_operation_launches_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ppo_nlu.kernels import linear_logprobs, online_logprobs, token_logprobs

        spies = {}
        for module, name in (
            (token_logprobs, "_forward"),
            (token_logprobs, "_backward"),
            (linear_logprobs, "_directions"),
            (linear_logprobs, "_combine"),
            (online_logprobs, "_partial"),
            (online_logprobs, "_merge"),
        ):
            spies[name] = Spy(getattr(module, name), run=True)
            monkeypatch.setattr(module, name, spies[name])

        def launched() -> list[str]:
            names = [name for name, spy in spies.items() for _ in spy.grids]
            for spy in spies.values():
                spy.grids.clear()
            return names

        hidden, weight, targets = head(2, 16, 5)
        ops.linear_logprobs(hidden, weight, targets)[0].sum().backward()
        assert launched() == ["_directions", "_combine"]
        with torch.no_grad():
            ops.linear_logprobs(hidden, weight, targets)
        assert launched() == ["_partial", "_merge"]
        ops.token_logprobs(hidden @ weight.T, targets)[0].sum().backward()
        assert launched() == ["_forward", "_backward"]

    def test_which_path_runs(self) -> None:
        from ppo_nlu.kernels.linear_logprobs import Head, choose_path

        hidden, weight, _ = head(2, 16, 9)
        plain_head = Head(weight, None, None, None, 1.0, 1.0)
        with_lora = plain_head._replace(lora_a=weight[:1], lora_b=weight[:, :1])
        assert choose_path(plain_head, hidden, direct=True) == "chunks"
        assert choose_path(plain_head, hidden, direct=False) == "online"
        assert choose_path(plain_head, hidden, True, "online") == "online"
        assert choose_path(with_lora, hidden, False, "online") == "chunks"
        assert choose_path(plain_head, hidden.double(), False) == "chunks"
        odd = plain_head._replace(weight=weight[:, 1:])
        assert choose_path(odd, hidden[:, 1:], False) == "chunks"
        assert choose_path(odd, hidden[:, 1:], False, "online") == "online"
        with pytest.raises(ValueError, match="'chunks' or 'online'"):
            choose_path(plain_head, hidden, False, "neither")

    def test_shapes_chosen_for_real_sizes(self) -> None:
        from ppo_nlu.kernels.linear_logprobs import BUDGET, chunk_rows
        from ppo_nlu.kernels.online_logprobs import split_count

        assert chunk_rows(8192, 152064, 4) == 256 and chunk_rows(8192, 32000, 4) == 1024
        assert chunk_rows(300, 152064, 4) == 150  # two equal chunks, not 256 and 44
        for rows in (1, 128, 5000):
            assert chunk_rows(rows, 152064, 4) * 152064 * 4 <= BUDGET
        assert split_count(1, 1188, 132) == 132  # few rows: one split a processor
        for row_tiles in (2, 8, 64, 1000):
            splits = split_count(row_tiles, 1188, 132)
            waves = -(-row_tiles * splits // 132)
            assert waves * -(-1188 // splits) * 132 <= 1.1 * row_tiles * 1188
        assert split_count(5, 1, 132) == 1

    def test_random_shapes(self) -> None:
        hypothesis = pytest.importorskip("hypothesis")
        numbers = hypothesis.strategies.integers

        @hypothesis.settings(max_examples=8, derandomize=True, deadline=None, database=None)
        @hypothesis.given(numbers(1, 20), numbers(1, 40), numbers(1, 140), numbers(0, 99))
        def holds(rows: int, width: int, vocab: int, seed: int) -> None:
            torch.manual_seed(seed)
            hidden, weight, targets = head(rows, width, vocab, scale=5.0)
            exact = leaf(hidden)
            theirs = plain(exact @ weight.double().T, targets)
            (b,) = grads(theirs[0].sum() + theirs[1].sum(), (exact,))
            for path in PATHS:
                ours = linear(hidden, weight, targets, path=path, entropy_grad=seed % 2 == 0)
                close(ours, theirs, 2e-5)
                (a,) = grads(ours[0].sum() + ours[1].sum(), (hidden,))
                assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-5
            close(ops.token_logprobs((exact @ weight.double().T).float(), targets), theirs, 2e-5)

        holds()


if RUNS_KERNELS:
    Test_token_logprobs, Test_linear_logprobs = TokenCases, LinearCases
else:
    SELECTED = {
        "token_logprobs": "Test_token_logprobs",
        "linear_logprobs": "Test_linear_logprobs and not online",
        "online_logprobs": "Test_linear_logprobs and online",
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("kernel", SELECTED)
    def test_in_the_interpreter(kernel: str) -> None:
        run_interpreted(__file__, SELECTED[kernel])
