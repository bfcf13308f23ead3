"""A chain as a folder in diffusers' layout: what `cascade export` and `Cascade.save_pretrained` write.

DIR = {model_index.json, pipeline.py, README.md, manifest.json, text_encoder/, tokenizer/, <stage>/{config.json,
diffusion_pytorch_model.safetensors, README.md}}. diffusers reads it by its own rules and runs it through
`cascade.bridge`; `read` verifies it by its manifest first.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cascade import checkpoint, foreign, loading, store
from cascade.chain import Chain
from cascade.config import locate, parse, plain
from cascade.errors import ConfigError, InputError
from cascade.loading import Load, load_stage
from cascade.request import take
from cascade.text import TextConfig, encoders
from cascade.text.encoders import TOKENIZER, encoder_files, find_encoder

INDEX, TEXT, TOKENS, CODE = "model_index.json", "text_encoder", "tokenizer", "pipeline.py"
BRIDGE, UNET, TOKENIZER_CLASS = "cascade.bridge", "CascadeUNet", "CascadeTokenizer"  # what diffusers loads stages with
PLACES = ("encoder", "store", "prior")  # of the settings of text, what the folder itself answers
PIPELINE = '''\
"""A chain of Cascade as a pipeline of diffusers, written by `cascade export`; needs the package cascade-video."""

from cascade import bridge


class CascadePipeline(bridge.CascadePipeline):
    # diffusers reads from this signature which folders to load.
    def __init__(self, text_encoder, tokenizer, {names}, chain=None):
        super().__init__(text_encoder, tokenizer, chain, {given})
'''
README = """\
---
library_name: diffusers
pipeline_tag: text-to-video
---
# A cascade of {names}

Text to {shape} (frames x height x width) at {fps:g} fps. The code is in the package `cascade-video`, which has to be
installed: `pipeline.py` imports it. The weights' licences stand in the README.md of each stage.

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
out = pipe("a prompt", generator=torch.Generator().manual_seed(0))
export_to_video(list(out.frames[0]), "video.mp4", fps=out.fps)
```

The same without diffusers, verified by `manifest.json`: `cascade.Cascade.from_pretrained(DIR)`.
"""


def check(chain: Chain, out: Path) -> None:
    """Raises ConfigError for what cannot be exported, InputError for what is not replaced, before anything loads."""
    store.check_ours(out, checkpoint.EXPORTED)
    taken = {TEXT, TOKENS, "chain", "cascade", *autoencoders(chain).values()}
    pipeline = foreign.model_class("DiffusionPipeline")
    if len(chain.texts) > 1 or chain.text.prior is not None or encoders.is_clip(find_encoder(chain.text.encoder)):
        raise ConfigError("text: only a chain all of whose stages read one T5 can be exported", fix="another chain")
    for stage in chain.stages:
        name = stage.name
        legal = name.isidentifier() and not name.startswith("_") and not keyword.iskeyword(name)
        if not legal or hasattr(pipeline, name) or name in taken:
            raise ConfigError(
                f"stage {name}: cannot be an attribute of a diffusers pipeline", fix="another name in `stages`"
            )


def check_safe(safe_serialization: bool) -> None:
    """Raises ValueError where weights are asked for as anything but safetensors."""
    if safe_serialization is not True:
        raise ValueError(f"safe_serialization is {safe_serialization}, expected True: nothing is ever pickled")


def autoencoders(chain: Chain) -> dict[str, str]:
    """The folder of each autoencoder, by where the chain has it: named for the first stage with its latents."""
    found: dict[str, str] = {}
    for stage in chain.stages:
        if stage.codec.weights is not None:
            found.setdefault(stage.codec.weights, f"{stage.name}_vae")
    return found


def others(chain: Chain) -> store.Pairs:
    """The files of what a chain needs beside its stages: text encoder, tokenizer, autoencoders."""
    for name, data in encoder_files(chain.text.encoder):
        yield f"{TEXT}/{name}", data
        if name == TOKENIZER:
            yield f"{TOKENS}/{name}", data
    for weights, name in autoencoders(chain).items():
        for file in (foreign.CONFIG, foreign.WEIGHTS):
            yield f"{name}/{file}", (locate(weights) / file).read_bytes()


def write(chain: Chain, out: Path, load: Load = load_stage, besides: Callable[[Chain], store.Pairs] = others) -> Path:
    """Writes the folder `out`, whole or not at all, from the stages that `load` gives, one after the other."""
    check(chain, out)
    return store.commit(out, _files(chain, load, besides(chain)), kind=checkpoint.EXPORTED, replace=True)


def _files(chain: Chain, load: Load, besides: store.Pairs) -> store.Pairs:
    names, coders = [stage.name for stage in chain.stages], autoencoders(chain)
    ours = {name: [BRIDGE, UNET] for name in names}
    ours |= {name: ["diffusers", "AutoencoderKL"] for name in coders.values()}
    index = {
        "_class_name": [Path(CODE).stem, "CascadePipeline"],
        "_diffusers_version": version("diffusers"),
        TEXT: ["transformers", "T5EncoderModel"],
        TOKENS: [BRIDGE, TOKENIZER_CLASS],
        "chain": {
            "stages": names,
            "text": {key: value for key, value in plain(chain.text).items() if key not in PLACES},
        },
    }
    last = chain.stages[-1]
    yield INDEX, store.canonical(index | ours)
    given = ", ".join(f"{name}={name}" for name in ours)
    yield CODE, PIPELINE.format(names=", ".join(ours), given=given).encode()
    yield checkpoint.CARD, README.format(names=", ".join(names), shape=last.shape, fps=last.fps).encode()
    yield from besides
    yield f"{TOKENS}/tokenizer_config.json", store.canonical({"tokenizer_class": TOKENIZER_CLASS})
    for cfg, rule in zip(chain.stages, chain.rules, strict=True):
        stage, _ = load(cfg, rule, torch.device("cpu"), torch.float32)
        coder = replace(cfg.codec, weights=coders.get(cfg.codec.weights or ""))
        settings = plain(replace(stage.cfg, weights=None, train=None, codec=coder))
        for name, data in checkpoint.portable(stage.net.state_dict(), settings, UNET).items():
            yield f"{cfg.name}/{name}", data
        if cfg.weights not in (None, checkpoint.RANDOM):
            card = checkpoint.locate(cfg.weights, cfg.name, cfg.sampler.steps) / checkpoint.CARD
            if card.is_file():
                yield f"{cfg.name}/{checkpoint.CARD}", card.read_bytes()


def read(folder: Path) -> Chain:
    """The chain in the folder that `write` made. Raises InputError."""
    folder = folder.resolve()
    index = store.from_json(store.member(folder, INDEX, checkpoint.EXPORTED), folder / INDEX)
    try:
        names, text = list(index["chain"]["stages"]), dict(index["chain"]["text"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX}: names no chain of Cascade", fix="cascade export out=DIR") from error
    trees = {}
    for name in names:
        config = store.from_json(store.member(folder, f"{name}/{checkpoint.CONFIG}"), folder / name / checkpoint.CONFIG)
        trees[name] = {**config["settings"], "weights": str(folder / name)}
        if (coder := trees[name]["codec"])["weights"] is not None:
            trees[name]["codec"] = {**coder, "weights": str(folder / coder["weights"])}
    return Chain.build(names, trees, parse({**text, "encoder": str(folder / TEXT)}, TextConfig, "text"))


@dataclass(kw_only=True)
class ExportConfig:
    """Where the chain goes, and how it is laid out."""

    format: str = "diffusers"
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.format != "diffusers":
            raise ValueError(f"format is {self.format!r}, expected diffusers")


def verb(tree: dict[str, Any]) -> Callable[[], None]:
    """`cascade export`: the folder's name on stdout."""
    ask = take(tree, ExportConfig)
    chain = Chain.read(tree, ["format", "out"])
    if ask.out is None:
        raise ConfigError("out is missing", fix="out=DIRECTORY")
    loading.check(chain)
    find_encoder(chain.text.encoder)
    check(chain, ask.out)

    def work() -> None:
        with store.lock(ask.out):
            print(write(chain, ask.out))

    return work
