"""The recipe of the tiny chain's text encoder: a SentencePiece model and a small T5 encoder, from nothing.

The encoder learns to say what stands in a caption of `cascade.data.shapes`: two read-outs, thrown away afterwards,
classify every attribute, one by attention over the tokens (what the video model's cross-attention sees) and one from
their mean (what its pooled condition sees). With two things they must be told apart by the order of mention.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import store
from cascade.data.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Spec, say
from cascade.data.scenes import draw_spec
from cascade.text.encoders import CONFIG, TOKENIZER, WEIGHTS

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import T5EncoderModel

PIECES = 512  # at most: 256 bytes, 3 marks, and what captions are made of
ARCHITECTURE = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": PIECES,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": False,
    "use_cache": False,
}
# Plain English for the tokenizer alone, so that words no caption has are not spelled letter by letter.
ENGLISH = """
the quick brown fox jumps over the lazy dog while the small child is watching from the other side of the street
there is a video of a person who is walking along the beach in the evening and another one is running with a dog
please show me something that looks like the inside of a big house with many windows and one open door
a cat was sitting on the table and then it jumped down quickly because somebody had called its name
this scene begins with nothing at all and ends with everything in motion, shot from above, in slow motion
they have been going around the world for some time, and now they want to come back before the winter
camera, zoom, light, dark, water, fire, tree, car, face, hand, people, city, night, morning, flying, falling
""".strip().splitlines()
log = logging.getLogger("cascade")


@dataclass(kw_only=True)
class FitConfig:
    """`steps` steps of `batch` captions, learning rate warmed up over `warmup` steps, then a cosine down to 0."""

    steps: int = 1500
    batch: int = 64
    rate: float = 1.5e-3
    warmup: int = 100
    captions: int = 20_000  # for the tokenizer
    two: float = 0.5  # share of captions with two things
    judged: int = 4000  # captions of every split in the report
    seed: int = 0


@dataclass
class Report:
    """`accuracy[split][read-out][slot]`, and mean and standard deviation of the entries of real tokens."""

    accuracy: dict[str, dict[str, dict[str, float]]]
    mean: float
    std: float


@dataclass
class Batch:
    """`ids` (B, L) padded with 0, `mask` (B, L), `answers` (B, slots)."""

    ids: Tensor
    mask: Tensor
    answers: Tensor


def slots() -> dict[str, list[str]]:
    """What a caption says: every slot with its classes; "" is a second thing that is absent."""
    thing = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "motion": MOTIONS}
    first = {f"{name} 1": list(values) for name, values in thing.items()}
    second = {f"{name} 2": ["", *values] for name, values in thing.items()}
    return {**first, **second, "background": list(BACKGROUNDS), "things": ["1", "2"]}


def answers(spec: Spec, caption: str) -> list[int]:
    """The class of every slot for `spec`, whose things are numbered as `caption` mentions them."""
    words = re.findall(r"[a-z]+", caption)
    things = sorted(spec.things, key=lambda thing: words.index(thing.colour))  # no two have one colour
    said = {"background": spec.background, "things": str(len(things))}
    for number in (1, 2):
        for name in ("shape", "colour", "size", "motion"):
            said[f"{name} {number}"] = getattr(things[number - 1], name) if number <= len(things) else ""
    return [classes.index(said[slot]) for slot, classes in slots().items()]


class ReadOut(nn.Module):
    """Classifies every slot, from the tokens by one attention layer and from their mean by a linear layer."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.sizes = [len(classes) for classes in slots().values()]
        self.query = nn.Parameter(torch.randn(len(self.sizes), width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.from_tokens = nn.ModuleList(nn.Linear(width, size) for size in self.sizes)
        self.from_mean = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, list[Tensor]]:
        """Logits (B, classes) of every slot by both ways; `tokens` (B, L, D), `mask` (B, L)."""
        query = self.query.expand(len(tokens), -1, -1)
        read, _ = self.attention(query, tokens, tokens, key_padding_mask=~mask, need_weights=False)
        real = mask[:, :, None].to(tokens.dtype)
        mean = (tokens * real).sum(1) / real.sum(1)
        return {
            "tokens": [head(read[:, slot]) for slot, head in enumerate(self.from_tokens)],
            "mean": list(self.from_mean(mean).split(self.sizes, 1)),
        }


def fit(out: Path, cfg: FitConfig | None = None) -> Report:
    """Fills the folder `out` with a tokenizer, a config and weights that `cascade.text` loads.

    The same config gives the same files on one machine and one thread; about ten minutes on one CPU core.
    """
    cfg = cfg or FitConfig()
    tokenizer = fit_tokenizer(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # transformers draws initial weights from the global generator
        model, read = _new_model(), ReadOut(int(str(ARCHITECTURE["d_model"])))
    _train(model, read, tokenizer, cfg)
    mean, std = _statistics(model, tokenizer, cfg)
    with torch.no_grad():
        model.encoder.final_layer_norm.weight.div_(std)
        read.attention.in_proj_weight[read.attention.embed_dim :] *= std  # keys and values; the query is its own
        read.from_mean.weight *= std
    report = Report(judge(model, read, tokenizer, cfg), mean / std, _statistics(model, tokenizer, cfg)[1])
    _save(out, model, tokenizer)
    return report


def fit_tokenizer(cfg: FitConfig) -> SentencePieceProcessor:
    """A unigram model (Kudo 2018) of captions and a little English, in lower case, that spells the rest in bytes."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    rng = np.random.default_rng([cfg.seed, 0])
    captions = [say(draw_spec(rng, cfg.two), rng) for _ in range(cfg.captions)]
    proto = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, *ENGLISH * 20]),
        model_writer=proto,
        model_type="unigram",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-",
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    tokenizer = SentencePieceProcessor()
    tokenizer.load_from_serialized_proto(proto.getvalue())
    return tokenizer


def judge(
    model: T5EncoderModel, read: ReadOut, tokenizer: SentencePieceProcessor, cfg: FitConfig
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by split, read-out and slot: trained compositions, held-out ones, wordings never trained."""
    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    splits = {"train": ("train", False), "held out": ("held_out", False), "unseen wording": ("all", True)}
    for name, (split, unseen) in splits.items():
        batches = _batches(tokenizer, cfg, 2, split, unseen)
        hits: dict[str, list[Tensor]] = {}
        for _ in range(math.ceil(cfg.judged / cfg.batch)):
            batch = next(batches)
            with torch.no_grad():
                logits = read(_tokens(model, batch), batch.mask)
            for way, outputs in logits.items():
                guess = torch.stack([output.argmax(1) for output in outputs], 1)
                hits.setdefault(way, []).append(guess == batch.answers)
        accuracy[name] = {
            way: dict(zip(slots(), torch.cat(parts).double().mean(0).tolist(), strict=True))
            for way, parts in hits.items()
        }
    return accuracy


def _batches(
    tokenizer: SentencePieceProcessor, cfg: FitConfig, stream: int, split: str = "train", unseen: bool = False
) -> Iterator[Batch]:
    rng = np.random.default_rng([cfg.seed, stream])
    while True:
        specs = [draw_spec(rng, cfg.two, split) for _ in range(cfg.batch)]
        captions = [say(spec, rng, unseen) for spec in specs]
        rows = [torch.tensor([*tokenizer.encode(caption), tokenizer.eos_id()]) for caption in captions]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        truth = torch.tensor([answers(spec, caption) for spec, caption in zip(specs, captions, strict=True)])
        yield Batch(ids, ids != 0, truth)


def _new_model() -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config.from_dict(ARCHITECTURE))


def _tokens(model: T5EncoderModel, batch: Batch) -> Tensor:
    tokens: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    return tokens


def _train(model: T5EncoderModel, read: ReadOut, tokenizer: SentencePieceProcessor, cfg: FitConfig) -> None:
    parameters = [*model.parameters(), *read.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.rate, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        done = (step - cfg.warmup) / max(cfg.steps - cfg.warmup, 1)
        return (step + 1) / cfg.warmup if step < cfg.warmup else (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step, batch in zip(range(cfg.steps), _batches(tokenizer, cfg, 1), strict=False):
        logits = read(_tokens(model, batch), batch.mask)
        truth = batch.answers.unbind(1)
        losses = {
            way: torch.stack([F.cross_entropy(*pair) for pair in zip(outputs, truth, strict=True)]).mean()
            for way, outputs in logits.items()
        }
        optimizer.zero_grad()
        torch.autograd.backward(losses["tokens"] + losses["mean"])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == cfg.steps:
            values = [loss.item() for loss in losses.values()]
            log.info("text step %d: loss %.4f from tokens, %.4f from their mean", step, *values)


@torch.no_grad()
def _statistics(model: T5EncoderModel, tokenizer: SentencePieceProcessor, cfg: FitConfig) -> tuple[float, float]:
    batches = _batches(tokenizer, cfg, 3)
    real = [_tokens(model, batch)[batch.mask] for _, batch in zip(range(8), batches, strict=False)]
    every = torch.cat(real).double()
    return float(every.mean()), float(every.std())


def _save(out: Path, model: T5EncoderModel, tokenizer: SentencePieceProcessor) -> None:
    # transformers ties the second name of the token embeddings to the first, so it is not stored.
    state = {key: value for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}
    files = {
        CONFIG: store.canonical(ARCHITECTURE),
        TOKENIZER: tokenizer.serialized_model_proto(),
        WEIGHTS: store.tensors_to_bytes(state, metadata=("format", "pt")),
    }
    store.commit(out, files, kind="text", replace=True)
