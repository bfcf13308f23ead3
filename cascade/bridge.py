"""Our stages as models of diffusers, a chain as its pipeline.

The one module beside Triton's that imports a heavy package as it loads, for its classes are diffusers'. It is imported
by the pipeline file of an exported folder (see cascade/export.py). diffusers finds out how to load a component by the
name of its base class in the module of the component: ModelMixin, PreTrainedTokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from transformers import PreTrainedTokenizer, T5EncoderModel  # noqa: F401  see above
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from cascade import export, foreign, store
from cascade.api import Cascade, Parts
from cascade.chain import Chain, Device
from cascade.codec import Autoencoder
from cascade.config import parse, plugin
from cascade.foreign import aligned
from cascade.loading import Loaded, told_weight
from cascade.settings import Rule, StageConfig
from cascade.stage import Stage
from cascade.text import Precision, T5Text, TextConfig, encoders
from cascade.text.encoders import TOKENIZER


class CascadeUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The denoiser of one stage; `settings` are the stage's. Called as it is in a stage."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        rule = plugin(settings["kind"])
        self.net = Stage(parse(settings, rule.Config), rule).net

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.net(*args, **kwargs)
        return out


class CascadeTokenizer(SentencePieceBackend):  # type: ignore[misc]
    """SentencePiece itself: transformers' T5Tokenizer gives other ids for words that have to be spelled in bytes."""

    vocab_files_names = {"vocab_file": TOKENIZER}  # noqa: RUF012  transformers' own form
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        fixed = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "split_special_tokens": True}
        super().__init__(vocab_file=vocab_file, **(kwargs | fixed | {"special_tokens_pattern": "eos"}))


class LoadedText(T5Text):
    """A text encoder that diffusers has loaded."""

    def __init__(self, cfg: TextConfig, tokenizer: CascadeTokenizer, model: T5EncoderModel) -> None:
        self.cfg, self.tokenizer, self.model = cfg, tokenizer.sp_model, model
        self.length, self.width, self.negative = cfg.max_tokens, int(model.config.d_model), cfg.negative
        self.fingerprint = ""  # nothing is kept that it could be the name of
        self._told = set()


class CascadePipeline(DiffusionPipeline):  # type: ignore[misc]
    """What `Cascade` is, as a pipeline of diffusers: loaded and moved as they are, called as `Cascade` is."""

    def __init__(
        self, text_encoder: T5EncoderModel, tokenizer: CascadeTokenizer, chain: Mapping[str, Any], **models: ModelMixin
    ) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer, **models)
        self.register_to_config(chain=dict(chain))

    @property
    def cascade(self) -> Cascade:
        """The same chain, with the components as they are now."""
        names, folder = self.config.chain["stages"], str(Path(self.text_encoder.name_or_path).resolve())
        encoder = parse({**self.config.chain["text"], "encoder": folder}, TextConfig, "text")
        models = {name: getattr(self, name).config for name in names}
        trees = {name: {**model["settings"], "weights": model.get("_name_or_path")} for name, model in models.items()}
        if encoder.precision is not Precision.FLOAT32:  # whatever precision diffusers was asked for
            self.text_encoder.to(getattr(torch, encoder.precision.value))
        source = LoadedText(encoder, self.tokenizer, aligned(self.text_encoder))
        on = Device(device=str(self.device), dtype=str(self.dtype).removeprefix("torch."))
        return Cascade(Chain.build(names, trees, encoder), Parts(lambda: source, self._stage), on)

    def _stage(self, cfg: StageConfig, rule: Rule, device: torch.device, dtype: torch.dtype) -> Loaded:
        cfg = told_weight(cfg, cfg.w_range)
        net = aligned(getattr(self, cfg.name).net).to(memory_format=torch.channels_last)
        stage = Stage(cfg, rule, net)
        if cfg.codec.weights is not None:
            model = aligned(getattr(self, cfg.codec.weights).to(torch.float32))
            stage.coder = Autoencoder(cfg.codec, model, cfg.codec.weights)
        return stage, ""

    def _others(self, chain: Chain) -> Iterator[tuple[str, bytes]]:
        """What `export.others` gives, from the components."""
        tokens = self.tokenizer.sp_model.serialized_model_proto()
        state = self.text_encoder.state_dict()
        state.pop("encoder.embed_tokens.weight")  # shared.weight again
        yield f"{export.TEXT}/{encoders.CONFIG}", self.text_encoder.config.to_json_string().encode()
        yield f"{export.TEXT}/{encoders.TOKENIZER}", tokens
        yield f"{export.TEXT}/{encoders.WEIGHTS}", store.tensors_to_bytes(state)
        yield f"{export.TOKENS}/{encoders.TOKENIZER}", tokens
        for name in export.autoencoders(chain):  # here the folder's name itself
            model = getattr(self, name)
            config = {key: value for key, value in model.config.items() if not key.startswith("_")}
            yield f"{name}/{foreign.CONFIG}", store.canonical({**config, "_class_name": type(model).__name__})
            yield f"{name}/{foreign.WEIGHTS}", store.tensors_to_bytes(model.state_dict())

    def __call__(self, *args: Any, callback_on_step_end: Any = None, **kwargs: Any) -> Any:
        """See `Cascade.__call__`; `callback_on_step_end` is given this pipeline."""
        cascade = self.cascade
        cascade.set_progress_bar_config(disable=getattr(self, "_progress_bar_config", {}).get("disable", False))
        if callback_on_step_end is not None:
            kwargs["callback_on_step_end"] = lambda _, *rest: callback_on_step_end(self, *rest)
        return cascade(*args, **kwargs)

    def save_pretrained(self, save_directory: str, safe_serialization: bool = True, **kwargs: Any) -> None:
        """The folder as `cascade export` writes it, with its pipeline file and manifest."""
        export.check_safe(safe_serialization)
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: not known here; the folder is always written as safetensors")
        export.write(self.cascade.chain, Path(save_directory), self._stage, self._others)
