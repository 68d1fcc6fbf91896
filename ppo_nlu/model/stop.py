"""Where an answer ends: the stop tag in its text, or a token that ends the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ppo_nlu.model.shape import text_config
from ppo_nlu.tasks.prompts import STOP
from ppo_nlu.tree.prefixes import Tokens


class StopDetector:
    """Tells when an answer is over: by an eos id, or when its text holds `</Judgement>`.

    The tag is looked for in the text, as the parser reads it, so its tokenisation does not matter.
    An answer is turned to text only when its newest token could hold the tag's last character.
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
        """Whether each answer is over with its last token."""
        return [row[-1] in self.eos or STOP in self._text(row) for row in rows]

    def _text(self, row: Tokens) -> str:
        if not self.may_end[row[-1]]:
            return ""
        return self.tokenizer.decode(
            list(row), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
