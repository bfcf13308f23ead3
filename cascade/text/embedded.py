"""Prompts as vectors: what every network reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Text:
    """Embedded prompts: `tokens` (B, L, D) float32 and `mask` (B, L), True where a token is real.

    `nothing` (1, L', D) is the dropped condition of classifier-free guidance for whoever reads such prompts; None: a
    prompt without real tokens. `memory` holds what networks made of these very prompts, see `once`; whatever is derived
    from a text begins without one.
    """

    tokens: Tensor
    mask: Tensor
    nothing: Text | None = field(default=None, repr=False, compare=False)
    memory: dict[Hashable, tuple[Tensor, ...]] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> Text:
        return Text(self.tokens[index], self.mask[index], self.nothing)

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """All prompts of `parts` in order, padded to the longest L; all have the same `nothing`."""
        longest = max(part.mask.shape[1] for part in parts)
        padded = [part.pad(longest) for part in parts]
        tokens, mask = torch.cat([part.tokens for part in padded]), torch.cat([part.mask for part in padded])
        return Text(tokens, mask, parts[0].nothing)

    @staticmethod
    def empty(batch: int, length: int, width: int) -> Text:
        """`batch` prompts without real tokens."""
        return Text(torch.zeros(batch, length, width), torch.zeros(batch, length, dtype=torch.bool))

    def remembering(self) -> Text:
        """The same prompts with an empty memory: for one sampling run, in which no weight changes."""
        return Text(self.tokens, self.mask, self.nothing, {})

    def once(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """make(), which depends on these prompts and `key` alone; one that remembers asks once, without gradients."""
        if self.memory is None:
            return make()
        if key not in self.memory:
            with torch.no_grad():
                self.memory[key] = make()
        return self.memory[key]

    def pad(self, length: int) -> Text:
        """The same prompts with zeros up to `length` tokens."""
        more = length - self.mask.shape[1]
        assert more >= 0, f"{self.mask.shape[1]} tokens do not fit in {length}"
        pad = torch.nn.functional.pad
        return Text(pad(self.tokens, (0, 0, 0, more)), pad(self.mask, (0, more)), self.nothing)

    def to(self, device: torch.device | str) -> Text:
        nothing = None if self.nothing is None else self.nothing.to(device)
        return Text(self.tokens.to(device), self.mask.to(device), nothing)

    def without(self) -> Text:
        """As many dropped prompts, of at least as many tokens."""
        if self.nothing is None:
            return Text.empty(*self.tokens.shape).to(self.tokens.device)
        one = self.nothing.pad(max(self.mask.shape[1], self.nothing.mask.shape[1]))
        return Text(one.tokens.repeat(len(self), 1, 1), one.mask.repeat(len(self), 1), self.nothing)

    def drop(self, keep: Tensor) -> Text:
        """The same prompts where `keep` (B,) is True, the dropped condition elsewhere."""
        if self.nothing is None:
            mask = self.mask & keep[:, None]
            return Text(self.tokens * mask[:, :, None], mask)
        none = self.without()
        said, keep = self.pad(none.mask.shape[1]), keep[:, None]
        tokens = torch.where(keep[:, :, None], said.tokens, none.tokens)
        return Text(tokens, torch.where(keep, said.mask, none.mask), self.nothing)

    def pooled(self) -> Tensor:
        """Mean over the real tokens (B, D); 0 for a dropped prompt."""
        mask = self.mask[:, :, None].to(self.tokens.dtype)
        return (self.tokens * mask).sum(1) / mask.sum(1).clamp(min=1)


def padded(rows: Sequence[Tensor], length: int, width: int, nothing: Text | None = None) -> Text:
    """`rows` (n, D) of different n as a Text of `length` tokens."""
    out = Text.empty(len(rows), length, width)
    for b, row in enumerate(rows):
        out.tokens[b, : len(row)] = row
        out.mask[b, : len(row)] = True
    out.nothing = nothing
    return out


class Reader(ABC):
    """Embeds prompts one at a time, so that a prompt does not depend on its batch.

    Texts are (B, length, width); `negative` is the prompt that is no text to a stage, None: zeros are.
    """

    length: int
    width: int
    negative: str | None

    @abstractmethod
    def _tokens(self, prompt: str) -> Tensor:
        """One prompt (n, D)."""

    def encode(self, prompts: Sequence[str]) -> Text:
        """`prompts`, padded with zeros to `length`."""
        return padded([self._tokens(prompt) for prompt in prompts], self.length, self.width, self.nothing)

    @cached_property
    def nothing(self) -> Text | None:
        """What no text is to a stage; None: zeros."""
        return None if self.negative is None else padded([self._tokens(self.negative)], self.length, self.width)
