"""The policy: one trunk in memory that is policy, reference (LoRA off) and critic at once."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppo_nlu import ops
from ppo_nlu.config import Config, ModelConfig, PromptConfig
from ppo_nlu.errors import UserError, first_line
from ppo_nlu.model import BUNDLED, lora, norms, path_check
from ppo_nlu.model.as_loaded import AsLoaded
from ppo_nlu.model.chat import Chat
from ppo_nlu.model.head_form import head_form, head_of
from ppo_nlu.model.shape import (
    Shape,
    context_of,
    decoder_of,
    limit_of,
    shape_of,
    text_config,
    windows,
)
from ppo_nlu.model.tokens import Codec
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks import TaskSpec
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import OPENING, STOP, Message, answer, render
from ppo_nlu.tree import pack, passes
from ppo_nlu.tree.checkpointing import checkpoint_blocks
from ppo_nlu.tree.decode_graph import Recorder
from ppo_nlu.tree.packed_row import Cost
from ppo_nlu.tree.passes import State
from ppo_nlu.tree.prefixes import PrefixCache, Tokens
from ppo_nlu.tree.trim import trim

VALUE_HEAD = "value_head.safetensors"  # beside the adapter
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ValueHead(nn.Module):
    """V(s) from the last hidden state, in fp32, zero at the start: an MLP, or a linear layer."""

    def __init__(self, hidden: int, kind: str = "mlp", width: int = 0):
        super().__init__()
        width = width or hidden
        self.body = nn.Sequential(nn.Linear(hidden, width), nn.GELU()) if kind == "mlp" else None
        self.out = nn.Linear(width if kind == "mlp" else hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, H) hidden states to (N,) values."""
        x = hidden.float()
        return self.out(x if self.body is None else self.body(x)).squeeze(-1)


@dataclass
class Scored:
    """What a pass says of the answers, all (B, R): zero where `mask` is False."""

    mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    hidden: Tensor  # (N, H), the states that predict the counted tokens, row by row


class Policy:
    """A causal language model with LoRA and a value head, and the text side of its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, value_head: ValueHead, cfg: ModelConfig):
        self.model, self.tokenizer, self.value_head = model, tokenizer, value_head
        self.device = next(model.parameters()).device
        self.decoder: nn.Module = decoder_of(model)
        self.head_form = head_form(model, self.decoder)
        trim(self.decoder)
        self.decoder.warn_if_padding_and_no_attention_mask = _no_warning
        self.detach_value = cfg.detach_value
        self.tree = True  # for rows that no window ends in
        self.window = min(windows(self.config), default=None)
        self.limit: int | None = None  # of the context, where it is not the model's own
        self.last_pass = Cost(0, 0, 0)
        self.checkpointing = False
        self.recorder: Recorder | None = None  # decode by recorded steps
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self.stop = StopDetector(model, tokenizer)
        self._codec: Codec | None = None
        self._chat: Chat | None = None

    @property
    def config(self) -> Any:
        """The configuration of the decoder; of a model that reads pictures too, of its text."""
        return self.decoder.config

    @property
    def context(self) -> int:
        """The longest sequence that is run, in tokens: what the model was made for, or less."""
        own = context_of(self.config)
        return own if self.limit is None else min(own, self.limit)

    @property
    def shape(self) -> Shape:
        """What plans of memory and time are made from."""
        return shape_of(self.decoder)

    def packs(self, longest: int) -> bool:
        """Whether rows of at most so many tokens take the prefix tree."""
        return self.tree and (self.window is None or longest <= self.window)

    @property
    def head(self) -> nn.Linear:
        """The LM head."""
        return head_of(self.model)

    def chat(self, messages: Sequence[Message], shots: bool = False) -> str:
        """The messages in the model's own chat format, up to where its answer begins; `shots`: the
        rows have worked examples."""
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                f"prompt.chat_template: {self.model.name_or_path!r} has no chat template; set it "
                "to false, or take a chat model"
            )
        if self._chat is None or self._chat.template is not template:
            self._chat = Chat(self.tokenizer, self.model.name_or_path)
        return self._chat.render(messages, shots)

    @property
    def codec(self) -> Codec:
        """The tokenizer as texts go through it."""
        if self._codec is None or self._codec.tokenizer is not self.tokenizer:
            rows = self.model.get_input_embeddings().weight.shape[0]
            self._codec = Codec(self.tokenizer, self.stop.eos, rows)
        return self._codec

    def encode(self, text: str) -> list[int]:
        """Token ids of a whole text, with the tokenizer's own opening token and no closing one."""
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids."""
        return self.codec.decode(ids, skip_special)

    def seal(self, text: str) -> str:
        """The text of a row, marked so that `encode` finds no control tokens in it."""
        return self.codec.seal(text)

    def hidden(
        self,
        prompts: Sequence[Tokens],
        answers: Sequence[Tokens],
        owners: Sequence[int] | None = None,
        opening: PrefixCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States that predict the answers' tokens (N, H), row by row, and the mask (B, R)."""
        longest = max(map(len, prompts)) + max(map(len, answers), default=0)
        tree = pack.build(prompts, answers, owners, self.packs(longest), opening)
        tree = tree.to(self.device)
        self.last_pass = cost = tree.cost
        count = sum(map(len, answers))
        saved = cost.tokens_full - cost.tokens_run
        profiling.count(
            cost.tokens_run, saved, positions=count, pairs=cost.pairs, wanted=cost.wanted
        )
        flat, _ = passes.run(self.decoder, tree, self.takes_positions)
        return flat.index_select(0, tree.positions[tree.mask]), tree.mask

    def _grown(
        self, trunk: State, answers: Sequence[Tokens], owners: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """`hidden` of answers behind prompts that were run before, under autograd."""
        hidden, mask, cost = passes.run_answers(self.decoder, trunk, answers, owners)
        saved = cost.tokens_full - cost.tokens_run
        profiling.count(cost.tokens_run, saved, positions=len(hidden), pairs=cost.pairs)
        before = trunk.tree.cost
        profiling.count_backward(before.tokens_run, before.pairs, before.wanted)
        return hidden, mask

    def score(
        self,
        prompts: Sequence[Tokens],
        answers: Sequence[Tokens],
        owners: Sequence[int] | None = None,
        temperature: float = 1.0,
        values: bool = False,
        entropy_grad: bool = False,
        trunk: State | None = None,
        opening: PrefixCache | None = None,
    ) -> Scored:
        """Log-probabilities, entropies and (where asked) values of the answers' tokens.

        `entropy_grad` says that the loss will ask for the entropy's gradient. With `trunk`, a pass
        over just these prompts that was run under autograd with these weights, the answers alone
        are run; a trunk serves one backward. An `opening` of the prompts, run with these weights,
        is not run again; it gets no gradient.
        """
        if trunk is None:
            hidden, mask = self.hidden(prompts, answers, owners, opening)
        else:
            assert trunk.tree.lengths == [len(prompt) for prompt in prompts]
            owners = range(len(answers)) if owners is None else owners
            hidden, mask = self._grown(trunk, answers, owners)
        targets = torch.tensor([t for a in answers for t in a], device=self.device)
        head, form = self.head, self.head_form
        logprobs, entropy = ops.linear_logprobs(
            hidden,
            head.weight,
            targets,
            bias=getattr(head, "bias", None),
            temperature=temperature / form.scale,
            entropy_grad=entropy_grad,
            softcap=form.cap and form.cap / form.scale,
        )
        critic = None
        if values:
            critic = unflatten(self.value(hidden), mask)
        return Scored(mask, unflatten(logprobs, mask), unflatten(entropy, mask), critic, hidden)

    def opening(self, prompts: Sequence[Tokens]) -> PrefixCache | None:
        """What these prompts begin with, run once for all passes over some of them with today's
        weights; None where that is little, or on the plain path."""
        if not self.tree:
            return None
        with profiling.phase("prefill"):
            found = passes.cache_prefix(self.decoder, prompts, self.window)
            if found is not None:
                n = len(found.tokens)
                profiling.count(n, -n, pairs=n * (n + 1) // 2, wanted=1)
        return found

    def value(self, hidden: Tensor) -> Tensor:
        """V(s) for each state (N, H), fp32."""
        return self.value_head(hidden.detach() if self.detach_value else hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) in fp32, not rounded on the way."""
        raw = ops.linear_logits(hidden, self.head.weight, getattr(self.head, "bias", None))
        return self.head_form.apply(raw)


def _no_warning(*_: Any) -> None:
    """GPT-2 would wait for the device at each pass, to warn of padding that a row has not."""


def unflatten(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the counted tokens into (B, R), zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


class StopDetector:
    """Tells when a response is over: an eos id, or a text that holds `</Judgement>`.

    The tag is looked for in the text that the parser reads, whatever its tokenisation; a row is
    decoded only when its newest token could hold the tag's last character.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.tokenizer = tokenizer
        listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        many = listed if isinstance(listed, list) else [listed]
        self.eos = {int(i) for i in [*many, tokenizer.eos_token_id] if i is not None}
        size = text_config(model).vocab_size
        pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
        closing = [i for i, piece in enumerate(pieces) if piece is None or STOP[-1] in piece]
        self.may_end = torch.zeros(size, dtype=torch.bool)
        self.may_end[closing + [i for i in self.eos if i < size]] = True

    def ended(self, rows: Sequence[Tokens]) -> list[bool]:
        """Whether each response is over with its last token."""
        return [row[-1] in self.eos or STOP in self._text(row) for row in rows]

    def _text(self, row: Tokens) -> str:
        if not self.may_end[row[-1]]:
            return ""
        return self.tokenizer.decode(
            list(row), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def resolve(name: str) -> str:
    """`bundled` as the folder of the bundled model; any other name as it is."""
    return str(BUNDLED) if name == "bundled" else name


def load_base(cfg: ModelConfig) -> tuple[Any, Any]:
    """The Hugging Face causal LM (eval mode, frozen) and its tokenizer; UserError where none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name, device = resolve(cfg.name_or_path), pick_device(cfg.device)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if path.is_dir():
        name = str(path)
        if not (path / "config.json").is_file():
            raise UserError(f"model.name_or_path: {path} holds no config.json; give a model folder")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"model.name_or_path: there is no folder {path}; check the path")
    else:
        options["local_files_only"] = not hub_answers(name)
    options_of_model = options | {
        "dtype": DTYPES[cfg.dtype],
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # told below
    }
    load = AutoModelForCausalLM.from_pretrained
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        try:
            loaded: Any = load(name, attn_implementation=cfg.attention, **options_of_model)
        except ValueError as error:
            if cfg.attention == "eager" or "attention implementation" not in str(error):
                raise
            loaded = load(name, attn_implementation="eager", **options_of_model)
            kind = loaded[0].config.model_type
            tell(f"attention is eager: {kind} has no {cfg.attention}")
    except Exception as error:  # whatever a broken folder makes of the library
        raise UserError(
            f"model.name_or_path: cannot load {cfg.name_or_path!r} ({reason_of(error)}); give a "
            "folder with config.json, weights and tokenizer, or a model name of the hub"
        ) from error
    model, info = loaded
    # The library fills these with random numbers.
    wrong = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"model.name_or_path: the weights of {cfg.name_or_path!r} are not whole: {len(wrong)} "
            f"tensors are missing or of another shape, such as {min(wrong)}; give a complete model"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer


def hub_answers(name: str) -> bool:
    """One try: without it the library repeats each file's request for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except HfHubHTTPError:
        return True  # an answer, if no good one; the loading says which
    except Exception:
        return False  # what is in the cache can still be loaded
    return True


def reason_of(error: Exception) -> str:
    """The first line of what the library says."""
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of more than tensors; ask for safetensors"
    first = first_line(error)
    return first if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; a GPU that is asked for and absent is a UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device: no such device {name!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: cuda is asked for, but torch sees no GPU; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"model.device: there is no {name}; torch sees {count} GPU(s), from cuda:0")
    return device


def load_policy(cfg: Config) -> Policy:
    """The base with fresh LoRA layers (zero at the start) and a fresh value head, from `seed`."""
    model, tokenizer = load_base(cfg.model)
    loaded, limit = measure(model, tokenizer, cfg)
    torch.manual_seed(cfg.seed)
    lora.attach(model, cfg.lora, idle=loaded.idle)
    norms.attach(model)
    width = head_of(model).in_features
    head = ValueHead(width, cfg.model.value_head, cfg.model.value_hidden)
    policy = Policy(model, tokenizer, head.to(next(model.parameters()).device), cfg.model)
    settle(policy, cfg, loaded, limit)
    if cfg.init_from:
        # Start from a trained adapter, which as a frozen copy is the reference too.
        lora.load_adapter(model, adapter_folder(cfg.init_from))
        lora.freeze_reference(model)
    if policy.tree and policy.device.type == "cuda" and cfg.rollout.cuda_graph:
        policy.recorder = Recorder(policy.decoder)
    if cfg.model.checkpointing:
        if not policy.tree:
            raise UserError(
                "model.checkpointing: needs the prefix tree, which this model cannot take; set it "
                "to false and lower ppo.micro_batch_size"
            )
        policy.checkpointing = True
        checkpoint_blocks(policy.decoder)
    return policy


def measure(model: Any, tokenizer: Any, cfg: Config) -> tuple[AsLoaded, int]:
    """What the model gives before anything of it is replaced, and where its context ends, which is
    told where it is early."""
    asked = cfg.data.max_prompt_tokens and cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    limit, note = limit_of(model, asked)
    tell(note)
    return AsLoaded.of(model, tokenizer, min(limit, asked or limit)), limit


def settle(policy: Policy, cfg: Config, loaded: AsLoaded, limit: int) -> None:
    """Choose the path, and how long rows may be; a model that neither path runs is a UserError."""
    policy.tree = path_check.choose_path(policy, cfg.model.path, loaded)
    policy.limit = limit
    if policy.tree and path_check.longest_row(policy, loaded) is not None:
        policy.limit = policy.window
        tell(f"rows end at {policy.window} tokens, the window of this model's attention")


def tell(note: str | None) -> None:
    """A line about the model for the user; on stderr, since stdout may be for answers."""
    if note:
        print(f"model: {note}", file=sys.stderr, flush=True)


def adapter_folder(path: str) -> Path:
    """The adapter of a run folder, or the adapter folder itself."""
    for folder in (Path(path) / "adapter", Path(path)):
        if (folder / lora.CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"init_from: {path} holds no {lora.CONFIG_FILE}; give a finished run or an adapter folder"
    )


def trainable(policy: Policy) -> list[nn.Parameter]:
    """LoRA weights, then the value head's: all that trains."""
    return [*lora.lora_parameters(policy.model), *policy.value_head.parameters()]


def check_words(policy: Policy, spec: TaskSpec, style: PromptConfig | None = None) -> None:
    """Each label word and the closing tag must survive the tokenizer; else a UserError."""
    form = (style or PromptConfig()).form
    fields = dict.fromkeys(spec.fields, "a film")
    prompt = render(spec, fields, form=form)
    for word in spec.words or ("a film",):
        wanted = answer(word, form)
        text = policy.decode(policy.encode(prompt + answer(policy.seal(word), form)))
        reply = text.rpartition(OPENING[form])[2]
        if parse(spec, reply, form) != word or STOP not in reply:
            raise UserError(
                f"model.name_or_path: the tokenizer of {policy.model.name_or_path!r} does not keep "
                f"{wanted.strip()!r} (it reads back {reply.strip()[-40:]!r}); "
                "use a model whose tokenizer knows these characters"
            )
