"""T5's encoder (Raffel et al. 2020), which the cascades of the papers and our own read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade import store
from cascade.errors import InputError, NumericError
from cascade.text import encoders
from cascade.text.embedded import Reader, Text
from cascade.text.encoders import CONFIG, TOKENIZER, find_encoder
from cascade.text.prompts import TextConfig, as_read

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

log = logging.getLogger("cascade")


class T5Text(Reader):
    """A frozen T5 encoder (Raffel et al. 2020) with its SentencePiece tokenizer.

    The network loads when it is first asked: it may be large, and prompts whose videos are there ask nothing. Raises
    InputError for files that are missing, damaged or do not fit, NumericError for weights that are not finite.
    """

    def __init__(self, cfg: TextConfig, device: str = "cpu") -> None:
        self.cfg, self.device = cfg, device
        self.length, self.negative = cfg.max_tokens, cfg.negative
        self.folder = find_encoder(cfg.encoder)
        verified = store.read(self.folder).files if (self.folder / store.MANIFEST).is_file() else {}
        file = encoders.near(self.folder, TOKENIZER)
        self.tokenizer = _tokenizer(file, encoders.data(file, verified))
        config = self.folder / CONFIG
        self.width = encoders.width(store.from_json(encoders.data(config, verified), config), config)
        self.fingerprint = encoders.fingerprint(self.folder, verified, cfg.reading)
        self._verified = verified
        self._told: set[str] = set()

    @cached_property
    def model(self) -> Any:
        dtype = getattr(torch, self.cfg.precision.value)
        model = encoders.built(self.folder, self._verified, _make, _weights, dtype, self.device)
        self._verified = {}
        pieces, rows = len(self.tokenizer), model.config.vocab_size
        if pieces > rows:
            raise InputError(
                f"text encoder {self.folder}: {TOKENIZER} has {pieces} pieces, the weights know {rows}",
                fix="take both files from one model",
            )
        return model

    def pieces(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Piece ids (N, L) int32 of many prompts, padding where their mask (N, L) is False; nothing is warned about."""
        room, end = self.cfg.max_tokens - 1, self.tokenizer.eos_id()
        texts = [as_read(prompt, self.cfg) for prompt in prompts]
        rows = [[*ids[:room], end] for ids in self.tokenizer.encode(texts)]
        longest = self.cfg.max_tokens if self.cfg.pad else max(map(len, rows))
        ids = torch.full((len(rows), longest), self._padding, dtype=torch.int32)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        ids[mask] = torch.tensor([piece for row in rows for piece in row], dtype=torch.int32)
        return ids, mask

    @torch.no_grad()
    def embed(self, ids: Tensor, mask: Tensor) -> Text:
        """Piece ids and mask (B, L), as `pieces` gives them, as prompts on their device: a whole batch at once.

        For training, where the last bits do not matter: they depend on what stands beside a prompt.
        """
        if self.model.device != ids.device:
            self.model.to(ids.device)
        real = torch.ones_like(mask) if self.cfg.pad else mask
        seen = mask if self.cfg.mask else real
        tokens: Tensor = self.model(input_ids=ids, attention_mask=seen.long()).last_hidden_state.float()
        nothing = None if self.nothing is None else self.nothing.to(ids.device)
        return Text(tokens * real[:, :, None], real, nothing)

    @property
    def _padding(self) -> int:
        return max(0, int(self.tokenizer.pad_id()))

    def _tokens(self, prompt: str) -> Tensor:
        """But for `pad` without padding: kernels sum in another order for another shape, so a prompt in a padded batch
        would differ in its last bits from the same prompt alone."""
        pieces = self.ids(prompt)
        real, told = len(pieces), {}
        if self.cfg.pad:
            pieces += [self._padding] * (self.cfg.max_tokens - real)
            if self.cfg.mask:
                told["attention_mask"] = (torch.arange(len(pieces)) < real)[None].long().to(self.model.device)
        ids = torch.tensor([pieces], device=self.model.device)
        with torch.no_grad():
            tokens: Tensor = self.model(input_ids=ids, **told).last_hidden_state[0].float().cpu()
        if not tokens.isfinite().all():
            raise NumericError(f"text encoder {self.folder}: not finite for {prompt!r}", fix="text.precision=float32")
        return tokens

    def ids(self, prompt: str) -> list[int]:
        """Piece ids of `prompt` and the end mark; warns about what is cut off and about words without a piece."""
        prompt = as_read(prompt, self.cfg)
        ids: list[int] = self.tokenizer.encode(prompt)
        room = self.cfg.max_tokens - 1
        if prompt not in self._told:
            self._told.add(prompt)
            self._warn(prompt, ids, room)
        return [*ids[:room], self.tokenizer.eos_id()]

    def _warn(self, prompt: str, ids: list[int], room: int) -> None:
        if len(ids) > room:
            lost = _printable(self.tokenizer.decode(ids[room:]))
            log.warning("prompt: longer than %d tokens, this is ignored: %s", self.cfg.max_tokens, lost)
        words = dict.fromkeys(prompt.split())
        spelled = [word for word in words if any(map(self.tokenizer.is_byte, self.tokenizer.encode(word)))]
        if spelled:
            log.warning("prompt: words the text encoder can only spell out: %s", _printable(", ".join(spelled)))
        unknown = [word for word in words if any(map(self.tokenizer.is_unknown, self.tokenizer.encode(word)))]
        if unknown:
            log.warning("prompt: words the text encoder does not know: %s", _printable(", ".join(unknown)))


def _tokenizer(path: Path, proto: bytes) -> SentencePieceProcessor:
    # Not T5Tokenizer: given a vocab_file it ignores the file without a word, and every word becomes <unk>.
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor()
    try:
        tokenizer.load_from_serialized_proto(proto)
    except RuntimeError as error:
        raise InputError(f"tokenizer {path}: is not a SentencePiece model", fix="copy it again") from error
    if tokenizer.eos_id() < 0:
        raise InputError(f"tokenizer {path}: has no end mark </s>, so it is not T5's", fix="take that of a T5")
    return tokenizer


def _make(settings: dict[str, Any]) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    model: torch.nn.Module = T5EncoderModel(T5Config(**settings))
    return model


def _weights(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The encoder's half of the weights; token embeddings under both names that transformers has for them."""
    state = {name: tensor for name, tensor in tensors if not name.startswith(("decoder.", "lm_head."))}
    if "shared.weight" in state:
        state.pop("encoder.embed_tokens.weight", None)
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return state


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
