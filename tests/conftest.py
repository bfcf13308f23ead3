"""Tiny stages of every kind, a text encoder made of hashes and a source of clips, for tests that need a whole stage.

The fixtures hand out the functions below them: scripts that tests start import this file instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from cascade.nets.unet_config import UNetConfig
    from cascade.settings import TrainConfig
    from cascade.stage import Stage
    from cascade.text import Text
    from cascade.video import Shape

WIDTH = 6  # of the tiny text encoder
CAPTIONS = ("a red circle", "a blue square moves", "two white stars stand still on a black background")
SHAPES = {"base": (4, 8, 8), "tsr": (4, 8, 8), "ssr": (4, 8, 8), "interp": (5, 8, 8)}
SHAPES |= {"relay": (4, 8, 8), "refine": (4, 8, 8)}
STRENGTH = {"refine": 0.5}
OWN: dict[str, dict[str, Any]] = {
    "base": {"known": 0.5},
    "tsr": {"factor": 2},
    "ssr": {"scale": 2},
    "interp": {"factor": 2},
    "relay": {"scale": 2},
    "refine": {"from_height": 4, "from_width": 6},
}
# The chain `mini`, from text to 15 x 16 x 16.
LEVEL = {"channels": 8, "mixer": "conv+attn", "text_attention": True}
STAGES: dict[str, dict[str, Any]] = {
    "base": {"kind": "base", "shape": {"frames": 4, "height": 8, "width": 8}, "fps": 2, "known": 0.5},
    "tsr": {"kind": "tsr", "shape": {"frames": 8, "height": 8, "width": 8}, "fps": 4, "factor": 2, "augment": 0.1},
    "ssr": {"kind": "ssr", "shape": {"frames": 8, "height": 16, "width": 16}, "fps": 4, "scale": 2, "augment": 0.1},
    "interp": {"kind": "interp", "shape": {"frames": 15, "height": 16, "width": 16}, "fps": 8, "factor": 2},
}


def tiny_net(**changes: Any) -> UNetConfig:
    """One level of eight channels."""
    from cascade.nets.unet_config import LevelSpec, UNetConfig

    return UNetConfig(**({"levels": [LevelSpec(channels=8)], "embedding": 8, "text": WIDTH, "head": 4} | changes))


def deep_net() -> UNetConfig:
    """Both mixers, text and two levels; of 16 channels, so that no gradient is rounding alone."""
    from cascade.nets.unet_config import LevelSpec, Mixer

    return tiny_net(levels=[LevelSpec(channels=16, mixer=Mixer.BOTH, text_attention=True), LevelSpec(channels=16)])


def tiny_train(**changes: Any) -> TrainConfig:
    """Four steps of two clips."""
    from cascade.settings import TrainConfig

    return TrainConfig(**({"steps": 4, "batch": 2, "lr": 1e-2, "ema": 0.5, "checkpoint_every": 2} | changes))


def tiny_config(kind: str, **changes: Any) -> Any:
    """A stage whose output is 4 (interp: 5) frames of 8 x 8, its input half of that."""
    from cascade.config import plugin
    from cascade.diffusion import Diffusion
    from cascade.sampling.sampler import Sampler
    from cascade.video import Shape

    frames, height, width = SHAPES[kind]
    settings = {
        "name": kind,
        "kind": kind,
        "shape": Shape(frames=frames, height=height, width=width),
        "fps": 8.0,
        "net": tiny_net(),
        "diffusion": Diffusion(),
        "sampler": Sampler(steps=3, strength=STRENGTH.get(kind, 1.0)),
        "train": tiny_train(),
    }
    return plugin(kind).Config(**(settings | OWN[kind] | changes))


def tiny_stage(kind: str, std: float = 0.0, **changes: Any) -> Stage:
    """A stage with new weights, all of them moved by noise of that size."""
    import torch

    from cascade.config import plugin
    from cascade.stage import Stage

    cfg = tiny_config(kind, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage = Stage(cfg, plugin(kind))  # type: ignore[arg-type]
    shake(stage.net, std)
    return stage


def shake(module: Any, std: float = 0.2) -> Any:
    """The module with noise of that size added to every parameter."""
    import torch

    from cascade.noise import generator

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator("shake", name))
    return module


def encode_text(prompts: Sequence[str]) -> Text:
    """A prompt's tokens are noise keyed by the prompt, one for each word and an end mark."""
    import torch

    from cascade.noise import generator
    from cascade.text import Text

    def one(prompt: str) -> Text:
        length = len(prompt.split()) + 1
        tokens = torch.randn(1, length, WIDTH, generator=generator("text", prompt))
        return Text(tokens, torch.ones(1, length, dtype=torch.bool))

    return Text.cat([one(prompt) for prompt in prompts])


@dataclass
class Clips:
    """A source of captioned clips: a bright bar on a dark ground that moves by a pixel a frame."""

    calls: int = 0

    def sample(self, shape: Shape, fps: float, *key: int | str) -> tuple[Tensor, str]:
        import torch

        from cascade.noise import generator

        self.calls += 1
        rng = generator("clip", *key)
        start, choice = int(torch.randint(shape.width, (), generator=rng)), int(torch.randint(3, (), generator=rng))
        clip = torch.full((3, shape.frames, shape.height, shape.width), -0.8)
        for f in range(shape.frames):
            clip[choice, f, :, (start + f) % shape.width] = 0.9
        return clip, CAPTIONS[choice]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine: for laws that hold bit for bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def net_config() -> Callable[..., UNetConfig]:
    return tiny_net


@pytest.fixture(scope="session")
def train_config() -> Callable[..., TrainConfig]:
    return tiny_train


@pytest.fixture(scope="session")
def stage_config() -> Callable[..., Any]:
    return tiny_config


@pytest.fixture(scope="session")
def make_stage() -> Callable[..., Stage]:
    return tiny_stage


@pytest.fixture(scope="session")
def shaken() -> Callable[..., Any]:
    return shake


@pytest.fixture(scope="session")
def encode() -> Callable[[Sequence[str]], Text]:
    return encode_text


@pytest.fixture(scope="session")
def source(encode: Any) -> SimpleNamespace:
    """A text source made of the tests' encoder."""
    return SimpleNamespace(width=6, fingerprint="test", encode=lambda prompts: encode(list(prompts)))


@pytest.fixture
def clips() -> Clips:
    return Clips()


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderKL: 4 channels, stride 2, as diffusers saves it."""
    import torch
    from diffusers import AutoencoderKL

    path = tmp_path_factory.mktemp("codec") / "vae"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
        ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration directory with the chain `mini` and its stages, with random weights."""
    import torch
    import yaml

    from cascade import loading
    from cascade.config import parse, plugin
    from cascade.stage import Stage

    conf = tmp_path_factory.mktemp("conf")
    (conf / "stage").mkdir()
    (conf / "chain").mkdir()
    for number, (name, own) in enumerate(STAGES.items()):
        tree = {
            "name": name,
            **own,
            "net": {"levels": [LEVEL], "embedding": 8, "text": 128, "head": 4},
            "diffusion": {"prediction": "v"},
            "sampler": {"steps": 2, "threshold": "static"},
            "weights": str(conf / "weights" / name),
            "train": {"steps": 2, "batch": 2, "lr": 1e-3, "ema": 0.5, "checkpoint_every": 1},
        }
        text = yaml.safe_dump(tree)
        (conf / "stage" / f"mini_{name}.yaml").write_text(f"# @package _global_\n{text}")
        stage = {key: value for key, value in tree.items()}
        cfg = parse(stage, plugin(own["kind"]).Config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            net = Stage(cfg, plugin(own["kind"])).net
            for parameter in net.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        loading.save_stage(conf / "weights" / name, cfg, net.state_dict(), "Random.")
    defaults = [{f"/stage@{name}": f"mini_{name}"} for name in STAGES]
    chain = {"defaults": [*defaults, "_self_"], "stages": list(STAGES), "text": {"max_tokens": 48}}
    (conf / "chain" / "mini.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(chain, sort_keys=False)}")
    return conf
