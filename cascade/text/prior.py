"""A prior: what a prompt says -> the CLIP embedding of a picture of it (Ramesh et al. 2022, unCLIP, sec. 2.2).

A transform of text: the stages of a chain that has one never see a prompt. The network is diffusers' PriorTransformer;
our own loop samples it, an embedding being a video of one pixel and `width` channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cascade import foreign
from cascade.config import fingerprint, plain
from cascade.diffusion import Diffusion, Prediction
from cascade.errors import ConfigError, InputError
from cascade.noise import Noise, sample_id
from cascade.sampling.guidance import guided
from cascade.sampling.sampler import Sampler, sample

NAME, WHAT, RANDOM = "PriorTransformer", "prior", "random"
DIFFUSION = Diffusion(prediction=Prediction.X)
TIMESTEPS = 1000  # the network is told t in this unit


@dataclass(kw_only=True)
class PriorConfig:
    """Settings of a prior.

    `weights` is a folder with a PriorTransformer as diffusers saves it, or "random". The numbers of the network say
    what it looks like, so that a chain can be checked without it, and are held against it when it is loaded. `seed`
    keys its noise: an embedding depends on the prompt, the encoder, the prior and it alone.

    The network is told a sentence by the encoder's last hidden state at its end mark, and zeros for no text. Published
    priors were trained otherwise (diffusers' unCLIP: text_embeds, which text_projection makes, and the encoded ""), so
    only one that was trained as it is asked here gives what it should.
    """

    sampler: Sampler
    weights: str | None = None
    width: int = 768  # of an embedding of a picture, and of the text encoder's
    layers: int = 20
    heads: int = 32
    head: int = 64  # channels of each
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.sampler.shared_noise or self.sampler.reconstruction or self.sampler.strength < 1:
            raise ValueError(
                "sampler has a setting for videos, expected none of shared_noise, reconstruction, strength"
            )

    def network(self, tokens: int) -> dict[str, int]:
        """Arguments of a PriorTransformer that reads `tokens` of text."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head,
            "num_layers": self.layers,
            "embedding_dim": self.width,
            "num_embeddings": tokens,
        }

    def open(self, tokens: int, device: str = "cpu") -> Prior:
        """The prior for prompts of `tokens`; see `foreign.load` for what it raises, and ConfigError without weights."""
        if self.weights is None:
            raise ConfigError(
                "the prior has no weights", fix=f"text.prior.weights=DIRECTORY, or text.prior.weights={RANDOM}"
            )
        if self.weights == RANDOM:
            return Prior(self, untrained(self, tokens), device, f"random {fingerprint(self.network(tokens))}")
        folder = foreign.find(self.weights, NAME, WHAT)
        model = foreign.load(folder, NAME, WHAT, "text.prior.weights")
        for name, value in self.network(tokens).items():
            if model.config[name] != value:
                raise InputError(
                    f"prior {folder}: has {name} {model.config[name]}, but the settings say {value}",
                    fix="text.prior as in its config.json, or another text.prior.weights",
                )
        return Prior(self, model, device, foreign.digest(folder))

    def params(self, tokens: int) -> int:
        """Parameters of the network."""
        with torch.device("meta"):
            return sum(p.numel() for p in foreign.model_class(NAME)(**self.network(tokens)).parameters())


def untrained(cfg: PriorConfig, tokens: int) -> Any:
    """A PriorTransformer with weights drawn at random, the same ones for equal settings, what starts at zero too."""
    network = cfg.network(tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(fingerprint(network)[:12], 16))
        model = foreign.model_class(NAME)(**network)
        for parameter in model.parameters():
            if not parameter.detach().any():
                torch.nn.init.uniform_(parameter, -0.035, 0.035)
    torch.nn.init.ones_(model.clip_std)
    return model.requires_grad_(False).eval()


class Prior:
    """A network that is ready; `hash` names its weights."""

    def __init__(self, cfg: PriorConfig, model: Any, device: str, weights: str) -> None:
        self.cfg, self.model, self.device = cfg, model.to(device), device
        self.hash = fingerprint([weights, plain(cfg.sampler), cfg.seed])

    @torch.no_grad()
    def __call__(self, tokens: Tensor, mask: Tensor, prompt: str) -> Tensor:
        """(1, L, width) text, of which `mask` (1, L) is real, -> (1, width) on the CPU; `prompt` keys the noise."""
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        noise = Noise(self.cfg.seed, WHAT, (sample_id(prompt),))
        told, dropped = partial(self.say, tokens, mask), partial(self.say, 0 * tokens, torch.zeros_like(mask))

        def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
            return guided(told, dropped, self.cfg.sampler.weight(step))(z, t)

        size = (1, self.cfg.width, 1, 1, 1)
        z = sample(DIFFUSION, denoise, self.cfg.sampler, noise, size, device=self.device)
        embedding: Tensor = self.model.post_process_latents(z.flatten(1)).float().cpu()
        return embedding

    def say(self, tokens: Tensor, mask: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """x_hat of z (1, width, 1, 1, 1); the sentence as a whole is its end mark, as CLIP has it, or 0 if dropped."""
        whole = tokens[:, mask.sum(1).clamp(min=1) - 1][:, 0] * mask.any(1, keepdim=True)
        out = self.model(z.flatten(1), TIMESTEPS * DIFFUSION.level(t), whole, tokens, mask)
        return out.predicted_image_embedding.view_as(z)  # type: ignore[no-any-return]
