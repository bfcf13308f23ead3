"""The networks that peers.py compares, built from benchmarks/peers.yaml with random weights, nowhere zero.

A builder takes settings and `Work` and returns (module, call): call(x) is one evaluation of a clip x (1, 3, F, H, W) at
some time, with a text where the network takes one, or for a chain the making of a whole clip. Packages are imported by
`load` alone, so that each child process holds only what it measures.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """One evaluation: a clip of so many frames and pixels, and the embedded text beside it."""

    frames: int
    height: int
    width: int
    tokens: int  # of the text
    text: int  # width of its embeddings
    embedded: Tensor = field(init=False)  # (1, tokens, text)

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedded", on_cpu((1, self.tokens, self.text), 1))

    def clip(self) -> Tensor:
        return on_cpu((1, 3, self.frames, self.height, self.width), 0)

    def on(self, device: torch.device) -> Work:
        """The same with its text on `device`."""
        there = replace(self)
        object.__setattr__(there, "embedded", self.embedded.to(device))
        return there


def on_cpu(shape: Sequence[int], seed: int) -> Tensor:
    """N(0, 1), drawn and left on the CPU: within `with device` too, where tensors are made elsewhere by default."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def build(package: str, settings: Settings, work: Work, named: bool = False) -> tuple[nn.Module, Call]:
    """The network of `package` in evaluation mode; `named`: with the numbers that `by_name` gives."""
    load(package)
    torch.manual_seed(0)
    net, call = NETWORKS[package].build(settings, work)
    (by_name if named else fill)(net)
    return net.eval(), call


def by_name(net: nn.Module) -> None:
    """Numbers that follow from a parameter's name and shape alone: equal in two codes of one architecture.

    Of standard deviation 0.1, around 1 where a norm multiplies: at 0.02 heads cut the wrong way hardly show.
    """
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            drawn = on_cpu(parameter.shape, crc32(name.encode()))
            parameter.copy_(0.1 * drawn + (parameter.ndim == 1 and name.endswith("weight")))


def fill(net: nn.Module) -> None:
    """Layers that start at zero get numbers as trained ones have: no kernel may profit from zeros."""
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)


def cascade(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """The denoiser of every stage here, with no video given and the text's tokens all real."""
    from cascade.cond import Cond
    from cascade.config import parse
    from cascade.nets.unet import VideoUNet
    from cascade.nets.unet_config import UNetConfig
    from cascade.text import Text

    net = VideoUNet(parse({**settings, "text": work.text}, UNetConfig))
    text = Text(work.embedded, torch.ones(1, work.tokens, dtype=torch.bool))
    blank = torch.zeros(1, 3, work.frames, work.height, work.width)
    cond = Cond(blank, blank[:, :1, :, :1, :1], torch.zeros(1), torch.full((1,), 8.0), text)
    return net, lambda x: net(x, x.new_full((1,), 0.5), cond)


def imagen(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """imagen-pytorch; max_text_len at the text's length, since it pads up to it."""
    from imagen_pytorch import Unet3D

    net = Unet3D(**settings, text_embed_dim=work.text, max_text_len=work.tokens)
    real = torch.ones(1, work.tokens, dtype=torch.bool)
    return net, lambda x: net(x, x.new_full((1,), 0.5), text_embeds=work.embedded, text_mask=real)


def make_a_video(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """make-a-video-pytorch, which takes no text."""
    from make_a_video_pytorch import SpaceTimeUnet

    net = SpaceTimeUnet(**settings)
    return net, lambda x: net(x, timestep=x.new_full((1,), 500.0))


def video_diffusion(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """video-diffusion-pytorch, which takes the text as one vector."""
    from video_diffusion_pytorch import Unet3D

    net = Unet3D(**settings, cond_dim=work.text)
    return net, lambda x: net(x, torch.full((1,), 500, device=x.device), cond=work.embedded.mean(1))


def diffusers_unet3d(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """UNet3DConditionModel of diffusers (ModelScope, Show-1)."""
    from diffusers import UNet3DConditionModel

    net = UNet3DConditionModel(in_channels=3, out_channels=3, cross_attention_dim=work.text, **settings)
    return net, lambda x: net(x, torch.tensor([500], device=x.device), work.embedded, return_dict=False)[0]


def diffusers_motion(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """UNetMotionModel of diffusers, given the text once for every frame as AnimateDiff's pipeline does."""
    from diffusers import UNetMotionModel

    net = UNetMotionModel(in_channels=3, out_channels=3, cross_attention_dim=work.text, **settings)
    told = work.embedded.repeat_interleave(work.frames, 0)
    return net, lambda x: net(x, torch.tensor([500], device=x.device), told, return_dict=False)[0]


def diffusers_latte(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """LatteTransformer3DModel of diffusers."""
    from diffusers import LatteTransformer3DModel

    net = LatteTransformer3DModel(
        in_channels=3, out_channels=3, caption_channels=work.text, sample_size=work.height, video_length=work.frames,
        **settings,
    )  # fmt: skip
    return net, lambda x: net(x, torch.tensor([500], device=x.device), work.embedded, return_dict=False)[0]


def diffusers_wan(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """WanTransformer3DModel of diffusers: attention over all positions of all frames."""
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(in_channels=3, out_channels=3, text_dim=work.text, **settings)
    return net, lambda x: net(x, torch.tensor([500], device=x.device), work.embedded, return_dict=False)[0]


def cascade_unet3d(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """Our code of what UNet3DConditionModel computes."""
    from cascade import config
    from cascade.nets import unet3d

    net = unet3d.UNet3D(config.parse({**settings, "text": work.text}, unet3d.UNet3DConfig))
    return net, lambda x: net.run(x, torch.tensor([500], device=x.device), work.embedded)


def cascade_chain(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """Two stages here, text -> a clip of half the side -> the clip."""
    from cascade.config import parse, plugin
    from cascade.stage import Stage
    from cascade.text import Text

    small = {"frames": work.frames, "height": work.height // 2, "width": work.width // 2}
    large = {"frames": work.frames, "height": work.height, "width": work.width}
    net = {**settings["net"], "text": work.text}
    stages = []
    for kind, own in (("base", {"shape": small}), ("ssr", {"shape": large, "scale": 2})):
        rule = plugin(kind)
        tree = {**settings, "net": net, "name": kind, "kind": kind, "fps": 8.0, **own}
        stages.append(Stage(parse(tree, rule.Config), rule))  # type: ignore[arg-type]
    text = Text(work.embedded, torch.ones(1, work.tokens, dtype=torch.bool))

    def noise(shape: Sequence[int], step: int, purpose: str) -> Tensor:
        return torch.randn(tuple(shape))

    def call(x: Tensor) -> Tensor:
        low = stages[0].sample(None, text, None, noise)
        return stages[1].sample(low, text, None, noise).frames

    return nn.ModuleList(stage.net for stage in stages), call


def imagen_chain(settings: Settings, work: Work) -> tuple[nn.Module, Call]:
    """The same cascade by imagen-pytorch, with its defaults but for the number of steps."""
    from imagen_pytorch import Imagen, Unet3D

    nets = [Unet3D(**settings["net"], text_embed_dim=work.text, max_text_len=work.tokens) for _ in range(2)]
    chain = Imagen(
        unets=nets, image_sizes=(work.height // 2, work.height), timesteps=settings["steps"], text_embed_dim=work.text
    )
    real = torch.ones(1, work.tokens, dtype=torch.bool)

    def call(x: Tensor) -> Tensor:
        return chain.sample(
            text_embeds=work.embedded, text_masks=real, video_frames=work.frames, cond_scale=1.0, use_tqdm=False
        )

    return chain, call


@dataclass(frozen=True)
class Network:
    """`module` brings all that `build` imports."""

    module: str
    build: Callable[[Settings, Work], tuple[nn.Module, Call]]


NETWORKS = {
    "cascade": Network("cascade.nets.unet", cascade),
    "imagen-pytorch": Network("imagen_pytorch", imagen),
    "make-a-video-pytorch": Network("make_a_video_pytorch", make_a_video),
    "video-diffusion-pytorch": Network("video_diffusion_pytorch", video_diffusion),
    "diffusers-unet3d": Network("diffusers.models.unets.unet_3d_condition", diffusers_unet3d),
    "diffusers-motion": Network("diffusers.models.unets.unet_motion_model", diffusers_motion),
    "diffusers-latte": Network("diffusers.models.transformers.latte_transformer_3d", diffusers_latte),
    "diffusers-wan": Network("diffusers.models.transformers.transformer_wan", diffusers_wan),
    "cascade-unet3d": Network("cascade.nets.unet3d", cascade_unet3d),
    "cascade-chain": Network("cascade.stage", cascade_chain),
    "imagen-pytorch-chain": Network("imagen_pytorch", imagen_chain),
}


# what the peers need to load -----------------------------------------------------------------------------------------


def load(package: str) -> None:
    """Imports what `package` needs. Raises ImportError if it is not installed.

    Two mends, which touch nothing that is measured: imagen-pytorch asks the hub for T5's settings as it loads, though
    every network here is told the width of its text; and torchvision, which the peers load, refuses to load beside a
    CPU build of torch if its own build is for CUDA, for want of two operators that nobody calls.
    """
    module = NETWORKS[package].module
    if not module.startswith("cascade"):
        declare_vision()
    if module == "imagen_pytorch":
        from transformers import T5Config

        T5Config.from_pretrained = classmethod(lambda cls, *_, **__: cls())
    importlib.import_module(module)


_declared: list[torch.library.Library] = []  # a library's schemas live as long as it does


def declare_vision() -> None:
    """Schemas of torchvision's operators where its compiled half does not load."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _declared:
        return
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
