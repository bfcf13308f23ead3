"""What a stage does and holds, counted without a weight or a pixel.

The real code runs on PyTorch's meta device, where tensors have shapes and no data: operations are counted as they would
be, and so is the memory that is alive at a time. For peak memory that is the whole of `Stage.sample`: state of the
sampler, guidance, windows, decoder's output and all. Nothing is fitted; what kernels hold inside a call does not show.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cascade import checkpoint, store
from cascade.chain import Device
from cascade.codec import COLOURS, Codec
from cascade.cond import Cond
from cascade.errors import ConfigError, InputError
from cascade.kernels import norm
from cascade.nets.layers import halved
from cascade.settings import Rule, StageConfig
from cascade.stage import Stage
from cascade.text import Text, TextConfig
from cascade.text.encoders import WEIGHTS, local_file
from cascade.video import Shape, Video

META = torch.device("meta")
STEPS = 3  # a first, an inner and a last one: no sampler holds more in its later steps
GEMM = 32 << 20  # bytes that cuBLAS takes from PyTorch's allocator on Hopper, and never gives back


@dataclass(frozen=True)
class Host:
    """What decides, beside its settings, what a stage holds: "cpu" or "cuda", the dtype, and clips at once."""

    device: str = "cpu"
    dtype: str = "float32"
    clips: int = 1

    @staticmethod
    def of(on: Device) -> Host:
        return Host(on.type, on.dtype, on.micro_batch)


class Sizes:
    """Noise of which nothing but the size is there."""

    def __call__(self, shape: Sequence[int], step: int, purpose: str) -> Tensor:
        return torch.empty(tuple(shape), device=META)

    def window(self, start: int) -> Sizes:
        return self


def work(cfg: StageConfig, rule: Rule, tokens: int) -> tuple[int, int]:
    """Parameters of the denoiser, and FLOPs of one evaluation of one clip, all of its windows."""
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton where it is installed

    stage = on_meta(cfg, rule)
    z = torch.empty(1, cfg.net.channels, *cfg.codec.inside(cfg.shape), device=META)
    cond = _blank((1, *cfg.incoming(cfg.shape)), tokens, cfg.net.text)
    t, w, flops = torch.empty(1, device=META), None if stage.cfg.w_range is None else 0.0, 0
    spans = cfg.windows.spans(cfg.shape.frames, rule.rate(cfg))
    for frames, many in Counter(end - first for first, end in spans).items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter, Fused() as attention:
            stage.denoise(z[:, :, :frames], t, cond.frames(0, frames), w)
        flops += many * (counter.get_total_flops() + attention.flops)
    params = sum(parameter.numel() for parameter in stage.net.parameters())
    return params, flops


def held(cfg: StageConfig, rule: Rule, tokens: int, host: Host, low: Shape | None = None) -> Count:
    """The memory that `Stage.sample` holds, weights and results included; so does the input, of size `low` or as set.

    On CUDA it is that of PyTorch's allocator. An autoencoder's own is not in it.
    """
    fewer = min(cfg.sampler.steps, STEPS)
    stage = on_meta(replace(cfg, sampler=replace(cfg.sampler, steps=fewer)), rule, told(cfg))
    stage.coder = Shapes(cfg.codec)
    dtype = getattr(torch, cfg.dtype or host.dtype)
    halved(stage.net, dtype)
    count = Count()
    if not cfg.offload:
        for parameter in stage.net.parameters():
            count.add(parameter)
    if not cfg.sampler.reconstruction:  # whose gradient passes through the network
        stage.call = Once(stage.net, count)

    with torch.no_grad(), norm.assumed(dtype if host.device == "cuda" else None), count, Fused(dtype):
        text = _text(host.clips, tokens, cfg.net.text)
        stage.sample(_incoming(cfg, rule, host.clips, low), text, None, Sizes())
    if host.device == "cuda":
        count.peak += GEMM
    return count


def on_meta(cfg: StageConfig, rule: Rule, w_range: list[float] | None = None) -> Stage:
    """The stage without data, as its weights would make it."""
    with META:
        stage = Stage(replace(cfg, w_range=w_range or told(cfg)), rule)
    stage.net.requires_grad_(False)
    return stage.to(META)


def told(cfg: StageConfig) -> list[float] | None:
    """The range of w that a guidance-distilled network is told: as set, or as recorded beside its weights."""
    path = (
        None
        if cfg.weights in (None, checkpoint.RANDOM)
        else checkpoint.locate(cfg.weights, cfg.name, cfg.sampler.steps) / "config.json"
    )
    if cfg.w_range is not None or path is None or not path.is_file():
        return cfg.w_range
    config = store.from_json(path.read_bytes(), path)
    found: list[float] | None = config.get("settings", config).get("w_range")  # an export's stand one level below
    return found


def takes(cfg: StageConfig, rule: Rule) -> Shape | None:
    """The size of what the stage before gives, as its settings have it; None to a stage that needs nothing."""
    try:
        rule.output(None, cfg)
    except ConfigError:
        return rule.takes(cfg)
    return None


def _incoming(cfg: StageConfig, rule: Rule, clips: int, low: Shape | None) -> Video | None:
    size = takes(cfg, rule)
    if size is None:  # known frames are not counted
        return None
    size = low or size
    frames = torch.empty(clips, cfg.colours, size.frames, size.height, size.width, device=META)
    return Video(frames, cfg.fps / rule.rate(cfg))


def _text(clips: int, tokens: int, width: int) -> Text:
    with META:
        return Text(torch.empty(clips, tokens, width), torch.empty(clips, tokens, dtype=torch.bool))


def _blank(size: Sequence[int], tokens: int, width: int) -> Cond:
    with META:
        mask = torch.empty(1, 1, size[2], 1, 1)
        return Cond(torch.empty(*size), mask, torch.empty(1), torch.empty(1), _text(1, tokens, width))


def encoder(text: TextConfig) -> int | None:
    """Parameters of the text encoder: 0 if embeddings come from a store, None if it is not on this machine."""
    if text.store is not None:
        return 0
    path = local_file(text.encoder, WEIGHTS)
    unused = ("decoder.", "lm_head.", "encoder.embed_tokens.", "vision_model.")  # the third is shared.weight again
    return None if path is None else stored(path, unused)


def stored(path: Path, without: tuple[str, ...] = ()) -> int:
    """Numbers in a safetensors file, from its header alone; `without` are beginnings of names that do not count."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.startswith(without)]  # noqa: SIM118  no dict
            return sum(prod(file.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise InputError(f"{path}: is not a safetensors file: {error}", fix="copy it again") from error


# modes ---------------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that are alive at once, `peak`, and elements that one tensor has, `largest`, of what runs inside.

    A storage counts from the operation that makes it until it is collected. On the meta device a copy to another device
    stays there, and a question of data (is all of it finite?) is answered by yes. It counts real tensors as well.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self.largest, self.alive = 0, 0, 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return True
            if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": META}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Counts the storage of `tensor`, if it is new."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            weakref.finalize(storage, self._free, storage.nbytes())
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            self.largest = max(self.largest, storage.nbytes() // tensor.element_size())

    def _free(self, size: int) -> None:
        self.alive -= size


class Fused(TorchFunctionMode):
    """Answers by tensors of the right shape scaled_dot_product_attention, 2 products of M N D for every head, and group
    norm, no products, which the meta device would take apart: half of the time of a plan.

    Fused kernels never hold all scores at once. `dtype` is autocast's, which meta tensors do not know:
    products and convolutions get operands of it, for as long as they last.
    """

    CAST = (F.linear, F.conv2d, F.scaled_dot_product_attention)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.flops, self.dtype = 0, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.dtype is not torch.float32 and func in self.CAST:
            args, kwargs = tree_map(self._cast, (args, kwargs or {}))
        if func is F.group_norm and not torch.is_grad_enabled():
            return torch.empty_like(args[0])
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]  # (B, h, M, D), (B, h, N, D)
        self.flops += 2 * prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.dtype is torch.float32 else value


class Once:
    """A network that runs once for each size of its input: what a further call holds is known from the first."""

    def __init__(self, net: torch.nn.Module, count: Count) -> None:
        self.net, self.count = net, count
        self._known: dict[tuple[int, ...], tuple[int, int, torch.dtype]] = {}

    def __call__(self, z: Tensor, *args: Any) -> Tensor:
        count, before, highest = self.count, self.count.alive, self.count.peak
        if z.shape not in self._known:
            count.peak = before
            out: Tensor = self.net(z, *args)
            self._known[tuple(z.shape)] = count.peak - before, out.shape[1], out.dtype
        else:
            _, channels, dtype = self._known[z.shape]
            out = z.new_empty(len(z), channels, *z.shape[2:], dtype=dtype)
        count.peak = max(highest, before + self._known[z.shape][0])
        return out


class Shapes:
    """A codec that knows its shapes alone."""

    hash = ""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def to(self, device: torch.device) -> Shapes:
        return self

    def encode(self, x: Tensor) -> Tensor:
        if self.codec.weights is None:
            return x
        side = self.codec.stride
        return x.new_empty(x.shape[0], self.codec.channels, x.shape[2], x.shape[3] // side, x.shape[4] // side)

    def decode(self, z: Tensor) -> Tensor:
        if self.codec.weights is None:
            return z
        return z.new_empty(z.shape[0], COLOURS, z.shape[2], *(side * self.codec.stride for side in z.shape[3:]))
