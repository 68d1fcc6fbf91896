"""The tokenizer: a SentencePiece model, and the same as tokenizer.json for AutoTokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.pretrain.config import TokenizerConfig
from ppo_nlu.pretrain.lessons import Material
from ppo_nlu.storage.files import atomic_write_bytes, atomic_write_text
from ppo_nlu.tasks.prompts import OPENING, STOP

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
# The last one makes an answer two tokens.
USER_PIECES = ("\n", OPENING["judgement"], STOP, " " + STOP)
# Each becomes one token behind a space.
LABEL_WORDS = (
    *("Positive", "Negative", "Yes", "No", "Entailment", "Neutral", "Contradiction", "First"),
    *("Second", "True", "False", "Same", "Different", "World", "Sports", "Business", "Science"),
)


def train_tokenizer(lines: Iterable[str], cfg: TokenizerConfig, folder: Path) -> None:
    """A byte-fallback BPE SentencePiece model, and the same as tokenizer.json for AutoTokenizer."""
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": cfg.vocab_size,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        # Without the dummy prefix a text begins with the token it would have after a line break.
        "add_dummy_prefix": False,
        "character_coverage": 1.0 - 1e-5,
        "max_sentence_length": 100_000,
        "user_defined_symbols": [piece.replace(" ", "▁") for piece in USER_PIECES],
        "pad_id": 3,
        "num_threads": 1,
        "minloglevel": 2,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, **settings
        )
    except RuntimeError as error:
        raise UserError(f"tokenizer.vocab_size: {cfg.vocab_size} does not fit: {error}") from None
    atomic_write_bytes(folder / "tokenizer.model", model.getvalue())
    write_fast_tokenizer(folder)


def merges_of(pieces: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, in the order in which SentencePiece prefers their results."""
    found = []
    for piece, rank in pieces.items():
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(a, b) for a, b in cuts if a in pieces and b in pieces]
        found += [(rank, pieces[a], pieces[b], a, b) for a, b in pairs]
    return [(a, b) for *_, a, b in sorted(found)]


def write_fast_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json with the ids of tokenizer.model."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    user = {symbol.replace(" ", "▁"): symbol for symbol in USER_PIECES}
    pieces = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    plain = {
        piece: i
        for i, piece in enumerate(pieces)
        if piece not in user and piece not in SPECIAL and not spm.is_byte(i)
    }
    vocab = {user.get(piece, piece): i for i, piece in enumerate(pieces)}
    fast = Tokenizer(
        models.BPE(vocab, merges_of(plain), unk_token="<unk>", byte_fallback=True, fuse_unk=False)
    )
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    fast.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    fast.add_tokens([AddedToken(s, special=False, normalized=False) for s in USER_PIECES])
    atomic_write_text(folder / "tokenizer.json", fast.to_str(pretty=False))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
    atomic_write_text(folder / "special_tokens_map.json", json.dumps(names, indent=1) + "\n")


def tokenizer_lines(m: Material, cfg: TokenizerConfig) -> Iterator[str]:
    """What the tokenizer learns from: the corpus, film text more often, and the form's words."""
    for name, texts in m.corpus.texts.items():
        if name == "SST-2 train phrases":
            continue  # they are parts of the sentences
        for text in texts:
            for line in text.split("\n"):
                yield from [line] * (cfg.film_weight if name in m.corpus.passes else 1)
    one_each = [lesson.prompts()[-1] for lesson in (*m.others, m.own)]
    for line in sorted({line for prompt in one_each for line in prompt.split("\n")}):
        yield from [line] * cfg.form_weight
    for word in LABEL_WORDS:
        yield from [f"a {word} b"] * cfg.form_weight


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as its users load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
