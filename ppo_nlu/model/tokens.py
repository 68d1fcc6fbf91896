"""Texts to token ids and back, with control tokens only where they are meant.

The letters of a control token, such as an end of turn, stand for it where a chat template or the
config writes them. In the text of a row they are text like any other: `seal` marks them there, and
`encode` takes what is marked for plain text. Every text is tokenised as a whole. One without marks
goes through the tokenizer as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ppo_nlu.errors import UserError, quoted

# Three code points that Unicode reserves for use inside programs: no text should hold them.
SEAL, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of an added token
_PROBED = 40  # control tokens, in the check of a copied tokenizer


class TextError(UserError):
    """A text that the model cannot read; a caller that knows the row may add its name."""


class Codec:
    """A tokenizer with the ids that end an answer, and the number of the model's embeddings."""

    def __init__(self, tokenizer: Any, eos: set[int], embeddings: int):
        self.tokenizer, self.eos, self.embeddings = tokenizer, eos, embeddings

    def encode(self, text: str) -> list[int]:
        """Token ids of a whole text, without the tokenizer's closing tokens. Its opening tokens are
        put in front, unless the text begins with them."""
        ids = self._split(text) if SEAL in text else self._plain(text)
        if ids and ids[-1] in self.eos and not text.endswith(self.decode(ids[-1:], False)):
            ids = ids[:-1]
        if self.opening and not self._opened(ids):
            ids = [*self.opening, *ids]
        if ids and max(ids) >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise TextError(
                f"model.name_or_path: the tokenizer's token {quoted(token)} (id {max(ids)}) is "
                f"beyond the model's {self.embeddings} embeddings; take the model's own tokenizer"
            )
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )

    def seal(self, text: str) -> str:
        """The text of a row with a mark in each piece that would become a control token."""
        marked = text.replace(SEAL, 2 * SEAL)
        if self._pattern is None:
            return marked
        sealed = self._pattern.sub(lambda found: f"{found[0][0]}{SEAL}{found[0][1:]}", marked)
        if sealed == text and self._loose and self._control & set(self._plain(text)):
            sealed = re.sub(r"\S", rf"\g<0>{SEAL}", text, count=1)  # one in another spelling
        return sealed

    def leaks(self, text: str) -> bool:
        """Whether the text of a row holds control tokens that cannot be made plain text."""
        sealed = self.seal(text)
        return sealed != text and bool(self._control & set(self._split(sealed)))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def opening(self) -> list[int]:
        """What the tokenizer puts in front of every text."""
        whole, bare = list(self.tokenizer("a")["input_ids"]), self._plain("a")
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start]
        return []

    def _opened(self, ids: Sequence[int]) -> bool:
        """Whether an opening token comes before the first token that is neither white space nor a
        control token."""
        for token in ids:
            if token in self.opening:
                return True
            if token not in self._control and self.decode([token], False).strip():
                return False
        return False

    # ---- control tokens

    @cached_property
    def _controls(self) -> dict[str, Any]:
        """Special tokens by their text, and those added tokens that the chat template writes, such
        as `<think>`. Other added tokens are words or runs of spaces."""
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        return {
            str(token): token
            for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values()
            if len(str(token)) > 1
            and (token.special or (str(token) in template and re.search(r"[<\[|]", str(token))))
        }

    @cached_property
    def _control(self) -> set[int]:
        found = self.tokenizer.convert_tokens_to_ids(list(self._controls))
        return set(found) - {getattr(self.tokenizer, "unk_token_id", None)}

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        longest = sorted(self._controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest))) if longest else None

    @cached_property
    def _loose(self) -> bool:
        """Whether control tokens are found in a text after the tokenizer has normalised it."""
        rewrites = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return rewrites is not None and any(token.normalized for token in self._controls.values())

    def _split(self, text: str) -> list[int]:
        """Token ids of a text with marks: what is marked is plain text, all other control tokens
        stay control tokens."""
        splitter = self._splitter
        if splitter is None:
            return self._plain(_unsealed(text))
        return splitter.encode(text)

    @cached_property
    def _splitter(self) -> _Splitter | None:
        """None where the tokenizer cannot be made to read control tokens as text."""
        if self._pattern is None or not getattr(self.tokenizer, "is_fast", False):
            return None
        made = _Splitter(self.tokenizer, self._controls, self._pattern)
        probe = " b c".join(["A film. ", *list(self._controls)[:_PROBED], "\nSo"])
        return made if made.encode(probe) == self._plain(probe) else None


class _Splitter:
    """A copy of a fast tokenizer that reads its control tokens as text, and knows them by other
    names. Those without a mark are renamed before, and get their ids back afterwards."""

    def __init__(self, tokenizer: Any, controls: dict[str, Any], pattern: re.Pattern[str]):
        from tokenizers import AddedToken

        self.tokenizer, self.pattern = copy.deepcopy(tokenizer), pattern
        self.names = {text: f"{_OPEN}{count}{_CLOSE}" for count, text in enumerate(controls)}

        def like(token: Any, text: str, special: bool) -> Any:
            return AddedToken(text, special=special, **{f: getattr(token, f) for f in _FLAGS})

        # Only special tokens can be read as text, so all control tokens of the copy are special.
        self.tokenizer.backend_tokenizer.add_special_tokens(
            [like(token, text, True) for text, token in controls.items() if not token.special]
        )
        names = [like(controls[text], name, False) for text, name in self.names.items()]
        self.tokenizer.add_tokens(names)
        self.real = {
            self.tokenizer.convert_tokens_to_ids(name): tokenizer.convert_tokens_to_ids(text)
            for text, name in self.names.items()
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with marks, without opening and closing tokens."""
        renamed = _unsealed(self.pattern.sub(lambda found: self.names[found[0]], text))
        found = self.tokenizer(renamed, add_special_tokens=False, split_special_tokens=True)
        return [self.real.get(token, token) for token in found["input_ids"]]


def _unsealed(text: str) -> str:
    return re.sub(f"{SEAL}({SEAL}?)", r"\1", text)
