"""Our stages as models of diffusers, a chain as its pipeline.

The one module beside Triton's that imports a heavy package as it loads, for its classes are diffusers'. It is imported
by the pipeline file of an exported folder (see cascade/export.py). diffusers finds out how to load a component by the
name of its base class in the module of the component: ModelMixin, PreTrainedTokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import PreTrainedTokenizer, T5EncoderModel  # noqa: F401  see above
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from cascade import store
from cascade.api import Cascade, Parts
from cascade.config import parse, plugin
from cascade.pipeline import Chain, Device
from cascade.stage import Rule, Stage, StageConfig
from cascade.text import CONFIG, TOKENIZER, WEIGHTS, Precision, T5Text, TextConfig


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


def aligned(module: nn.Module) -> nn.Module:
    """The module with parameters that begin where torch's own begin, as checkpoint.apply leaves them, in our layout."""
    for parameter in module.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    return module.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class LoadedText(T5Text):
    """A text encoder that diffusers has loaded."""

    def __init__(self, cfg: TextConfig, tokenizer: CascadeTokenizer, model: T5EncoderModel) -> None:
        self.cfg, self.tokenizer, self.model = cfg, tokenizer.sp_model, model
        self.fingerprint = ""  # nothing is kept that it could be the name of
        self._told = set()

    def files(self) -> Iterator[tuple[str, bytes]]:
        """What `text.encoder_files` gives of a folder."""
        yield CONFIG, self.model.config.to_json_string().encode()
        yield TOKENIZER, self.tokenizer.serialized_model_proto()
        shared = "encoder.embed_tokens.weight"  # shared.weight again
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name != shared}
        yield WEIGHTS, store.tensors_to_bytes(state)


class CascadePipeline(DiffusionPipeline):  # type: ignore[misc]
    """What `Cascade` is, as a pipeline of diffusers: loaded and moved as they are, called as `Cascade` is."""

    def __init__(
        self, text_encoder: T5EncoderModel, tokenizer: CascadeTokenizer, chain: Mapping[str, Any], **stages: CascadeUNet
    ) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer, **stages)
        self.register_to_config(chain=dict(chain))

    @property
    def cascade(self) -> Cascade:
        """The same chain, with the components as they are now."""
        names, text = self.config.chain["stages"], parse(self.config.chain["text"], TextConfig, "text")
        models = {name: getattr(self, name).config for name in names}
        trees = {name: {**model["settings"], "weights": model.get("_name_or_path")} for name, model in models.items()}
        if text.precision is not Precision.FLOAT32:  # whatever precision diffusers was asked for
            self.text_encoder.to(getattr(torch, text.precision.value))
        source = LoadedText(text, self.tokenizer, aligned(self.text_encoder))

        def load(cfg: StageConfig, rule: Rule, device: torch.device) -> tuple[Stage, str]:
            return Stage(cfg, rule, aligned(getattr(self, cfg.name).net)), ""

        on = Device(device=str(self.device), dtype=str(self.dtype).removeprefix("torch."))
        return Cascade(Chain.build(names, trees, text), Parts(lambda: source, load, source.files), on)

    def __call__(self, *args: Any, callback_on_step_end: Any = None, **kwargs: Any) -> Any:
        """See `Cascade.__call__`; `callback_on_step_end` is given this pipeline."""
        cascade = self.cascade
        cascade.set_progress_bar_config(disable=getattr(self, "_progress_bar_config", {}).get("disable", False))
        if callback_on_step_end is not None:
            kwargs["callback_on_step_end"] = lambda _, *rest: callback_on_step_end(self, *rest)
        return cascade(*args, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """The folder as `cascade export` writes it, with its pipeline file and manifest."""
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: not known here; the folder is always written as safetensors")
        self.cascade.save_pretrained(save_directory)
