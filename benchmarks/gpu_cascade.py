"""What a stage of a cascade should take on a GPU, by the roofline of its operations, and what it takes there."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import ceil
from statistics import median
from typing import Any, TypeVar

import torch
from gpu_unet import configured
from measure import REFUSALS, Run, why
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cascade import attention
from cascade.attention import xformers
from cascade.cond import Cond
from cascade.config import parse, plugin
from cascade.kernels import norm
from cascade.loading import untrained
from cascade.nets.compiled import Compile, compiled
from cascade.nets.layers import halved
from cascade.noise import Noise, sample_id
from cascade.planning.count import META, Fused, Host, held, on_meta, takes
from cascade.settings import Rule, StageConfig
from cascade.stage import Stage
from cascade.text import Text
from cascade.video import Video

Out = TypeVar("Out")
Calls = Mapping[str, Callable[[], Any]]
Norming = tuple[int, int, int, int, bool, bool]  # channels, height, width, groups, FiLM, SiLU

# what it should take -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Rates:
    """What is expected of a card; shares are of `ceiling` for what multiplies, of `bandwidth` for the others."""

    device: str
    ceiling: float  # FLOP/s of large products in bfloat16
    bandwidth: float  # bytes/s of a large copy
    convolution: float
    product: float
    attention: float
    norm: float
    rest: float
    columns: int  # output channels are computed in multiples of this
    launch: float  # seconds that Python and the driver need for a kernel

    def seconds(self, kind: str, flops: int, moved: int, columns: int | None) -> float:
        """Of one kernel: whichever takes longer, its products or its bytes."""
        share = getattr(self, kind)
        if kind in ("norm", "rest"):
            return float(moved / (share * self.bandwidth))
        used = 1.0 if columns is None else columns / (ceil(columns / self.columns) * self.columns)
        return float(max(flops / (share * used * self.ceiling), moved / (self.rest * self.bandwidth)))


class Roofline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, by kind, the seconds of the kernels that run inside: one after the other, each reads and writes once."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates = rates
        self.kinds: dict[str, float] = defaultdict(float)
        self.flops = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or "empty" in func.__name__:
            return out
        packet, flops, columns, kind = func._overloadpacket, 0, None, "rest"
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            convolves = packet is torch.ops.aten.convolution
            kind, columns = ("convolution", len(args[1])) if convolves else ("product", out.shape[-1])
        elif packet is torch.ops.cascade.group_norm:
            kind = "norm"
        self.add(kind, flops, (args, kwargs, out), columns)
        return out

    def add(self, kind: str, flops: int, touched: Any, columns: int | None = None) -> None:
        """A kernel that reads and writes the tensors in `touched`, an expanded one as far as it is stored."""
        tensors = (x for x in tree_leaves(touched) if isinstance(x, Tensor))
        moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        self.kinds[kind] += self.rates.seconds(kind, flops, moved, columns)
        self.flops += flops
        self.launches += 1

    @property
    def seconds(self) -> float:
        """On the GPU, or in Python if that takes longer."""
        return max(sum(self.kinds.values()), self.launches * self.rates.launch)

    def why(self) -> str:
        """The three kinds that take most, as shares of the GPU's time."""
        total, most = sum(self.kinds.values()), sorted(self.kinds.items(), key=lambda item: -item[1])[:3]
        words = ", ".join(f"{kind} {100 * seconds / total:.0f} %" for kind, seconds in most)
        return words if self.seconds == total else f"{self.launches} launches; {words}"


class Attended(Fused):
    """Tells a roofline of attention, whose scores no kernel writes to memory."""

    def __init__(self, roofline: Roofline) -> None:
        super().__init__(torch.bfloat16)
        self.roofline = roofline

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.flops
        out = super().__torch_function__(func, types, args, kwargs)
        if self.flops > before:
            q, k, v = args[:3]
            self.roofline.add("attention", self.flops - before, (q, k, v, out))
        return out


def roofline(cfg: StageConfig, rule: Rule, tokens: int, rates: Rates) -> Roofline:
    """One evaluation of one clip, with our kernels and weights in bfloat16."""
    stage = on_meta(cfg, rule)
    stage.net.to(torch.bfloat16)
    call, found = evaluation(stage, tokens, META), Roofline(rates)
    with torch.no_grad(), norm.assumed(torch.bfloat16), found, Attended(found):
        call()
    return found


class Normed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers what norms are asked for inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[Norming] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops.cascade.group_norm:
            x, _, _, film, groups, _, silu, _ = args
            self.found.add((*x.shape[1:], groups, film is not None, silu))
        return func(*args, **(kwargs or {}))


def normings(cfg: StageConfig, rule: Rule, tokens: int) -> set[Norming]:
    """All that the norms of a stage are asked for."""
    stage, found = on_meta(cfg, rule), Normed()
    stage.net.to(torch.bfloat16)
    call = evaluation(stage, tokens, META)
    with torch.no_grad(), norm.assumed(torch.bfloat16), found, Fused(torch.bfloat16):
        call()
    return {each for each in found.found if each[0] <= norm.CHANNELS}


def compile_norms(asked: Sequence[Norming], device: torch.device) -> None:
    """By running them on one image, with weights in float32 and in bfloat16."""
    half = {"device": device, "dtype": torch.bfloat16}
    for channels, height, width, groups, filmed, silu in asked:
        x = torch.randn(1, channels, height, width, **half).contiguous(memory_format=torch.channels_last)  # type: ignore[arg-type]
        film = torch.randn(1, 2 * channels, **half) if filmed else None  # type: ignore[arg-type]
        for dtype in (torch.bfloat16, torch.float32):
            weight, bias = torch.randn(2, channels, device=device, dtype=dtype)
            norm.group_norm(x, weight, bias, film, groups=groups, silu=silu)


# what it takes -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Size:
    """A stage at so many frames, and what is expected of it."""

    frames: int
    flops: int  # of one evaluation
    peak_bytes: int  # of `Stage.sample` on CUDA in bfloat16, by cascade.planning.count
    ms: float  # of one evaluation


@dataclass(kw_only=True)
class Entry:
    """A stage at the sizes that may be tried, the whole one first."""

    settings: dict[str, Any]
    params: int
    evaluations: int
    sizes: list[Size]

    def read(self, frames: int) -> tuple[StageConfig, Rule]:
        """Its settings for a clip of so many frames."""
        rule: Any = plugin(self.settings["kind"])
        cfg = parse({**self.settings, "shape": {**self.settings["shape"], "frames": frames}}, rule.Config)
        return cfg, rule


def peak(cfg: StageConfig, rule: Rule, tokens: int) -> int:
    """Bytes that the plan predicts for CUDA in bfloat16."""
    return held(cfg, rule, tokens, Host("cuda", "bfloat16")).peak


def evaluation(stage: Stage, tokens: int, device: torch.device) -> Callable[[], Tensor]:
    """One evaluation of one clip: random video, the prompt projected once as in a sampling run."""
    cfg = stage.cfg
    draw = torch.empty if device == META else torch.randn
    shape = (1, cfg.net.channels, *cfg.codec.inside(cfg.shape))
    z, low = draw(shape, device=device), draw(shape, device=device)
    mask = torch.ones(1, 1, shape[2], 1, 1, device=device)
    text = Text(draw(1, tokens, cfg.net.text, device=device), torch.ones(1, tokens, dtype=torch.bool, device=device))
    level, fps, t = (torch.full((1,), x, device=device) for x in (cfg.augment, cfg.fps, 0.5))
    cond = Cond(low, mask, level, fps, text).remembering()
    w = None if cfg.w_range is None else cfg.w_range[0]
    return lambda: stage.denoise(z, t, cond, w)


def twin(stage: Stage) -> Stage:
    """Another stage with the same weights, in the same memory."""
    other = on_meta(stage.cfg, stage.rule)
    other.net.load_state_dict(stage.net.state_dict(), assign=True)
    other.net.requires_grad_(False)
    return other


def ways(shipped: Stage, tokens: int, device: torch.device, launches: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    """An evaluation by each of the ways to run it; none is tried here. Weights of products are in bfloat16, as
    `loading.load_stage` has them, but for those of `shipped`."""
    half = twin(shipped)
    halved(half.net, torch.bfloat16)

    def way(stage: Stage, kernels: str = "ours", name: str | None = None) -> Callable[[], Tensor]:
        return within(evaluation(stage, tokens, device), device, kernels, name)

    def launched(how: Compile) -> Stage:
        stage = twin(half)
        stage.call = compiled(stage.net, how, "inductor" if device.type == "cuda" else "eager")
        return stage

    makers = {
        "ours": lambda: way(half),
        "torch": lambda: way(half, "torch"),
        "xformers": lambda: way(half, "norm", "xformers"),
        "float32 weights": lambda: way(shipped),
        "graph": lambda: way(launched(Compile.GRAPH)),
        "regional": lambda: way(launched(Compile.REGIONAL)),
    }
    return {name: deferred(makers[name]) for name in launches}


def deferred(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """make()(), made at the first call."""
    made: list[Callable[[], Tensor]] = []

    def call() -> Tensor:
        if not made:
            made.append(make())
        return made[0]()

    return call


def within(call: Callable[[], Out], device: torch.device, kernels: str, name: str | None = None) -> Callable[[], Out]:
    """`call` in bfloat16 with kernels as `gpu_unet.configured` names them; `name`: for all attention.

    Without one, "auto" does not see xformers, which would take all but attention over frames: that is a way of its own.
    """

    def inside() -> Out:
        with ExitStack() as stack:
            chosen: AbstractContextManager[None] = configured(kernels, True, device.type)
            stack.enter_context(torch.no_grad())
            stack.enter_context(chosen)
            stack.enter_context(attention.use(name) if name is not None else without_xformers())
            return call()

    return inside


@contextmanager
def without_xformers() -> Iterator[None]:
    """Inside, xformers is not available."""
    available, xformers.available = xformers.available, lambda q, bias=None: "it is measured by itself"
    try:
        yield
    finally:
        xformers.available = available


def works(calls: Calls) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those of `calls` that answer with finite numbers, warmed up, and why the others do not."""
    good, refused = {}, {}
    for name, call in calls.items():
        try:
            finite = bool(torch.isfinite(call()).all())
            call()
        except REFUSALS as error:
            refused[name] = why(error)
        else:
            if finite:
                good[name] = call
            else:
                refused[name] = "an answer that is not finite"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next way may need it in other pieces
    return good, refused


def rounds(run: Run, calls: Calls, count: int, reserve: float = 0.0) -> dict[str, list[float]]:
    """Milliseconds of each call in every round; fewer rounds where fewer than `reserve` seconds are left."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count):
        if number and run.late("rounds", reserve):
            break
        for name, call in calls.items():
            taken[name].append(clock(run.device, call))
    return taken


def clock(device: torch.device, call: Callable[[], Any]) -> float:
    """Milliseconds of call(), on CUDA between two events."""
    if device.type != "cuda":
        before = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - before)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def summary(taken: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Median, least and greatest."""
    return {name: [median(each), min(each), max(each)] for name, each in taken.items()}


def squares(device: torch.device, side: int) -> Callable[[], Tensor]:
    """The product of two square matrices in bfloat16: the ceiling."""
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return lambda: a @ b


def build(cfg: StageConfig, rule: Rule, device: torch.device, dtype: torch.dtype = torch.float32) -> Stage:
    """The stage with random weights, nowhere zero, drawn on the device."""
    with device:
        return untrained(cfg, rule, device, dtype)[0]


def sampled(stage: Stage, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds of a whole sampling run and the allocator's peak with the weights in it.

    As the chain makes it: the video before and the noise come from the CPU.
    """
    cfg, size = stage.cfg, takes(stage.cfg, stage.rule)
    low = None
    if size is not None:
        frames = torch.rand(1, cfg.colours, size.frames, size.height, size.width) * 2 - 1
        low = Video(frames, cfg.fps / stage.rule.rate(cfg))
    text = Text(torch.randn(1, tokens, cfg.net.text), torch.ones(1, tokens, dtype=torch.bool))
    noise = Noise(0, cfg.name, (sample_id("a benchmark"),))
    on_gpu = device.type == "cuda"
    weights = sum(p.numel() * p.element_size() for p in stage.net.parameters())
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated() if on_gpu else 0, time.perf_counter()
    with torch.no_grad(), configured("ours", True, device.type):
        made = stage.sample(low, text, None, noise)  # it ends on the CPU, so it has waited
    found = {"seconds": time.perf_counter() - began, "finite": float(bool(torch.isfinite(made.frames).all()))}
    if on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before + weights
    return found


def free() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller(cfg: StageConfig, rule: Rule, least: int = 8) -> list[StageConfig]:
    """The stage, and with half and a quarter of its frames as far as these are at least `least`."""
    counts = [cfg.shape.frames // n for n in (1, 2, 4)]
    kept = [n for n in counts if n == cfg.shape.frames or n >= max(least, rule.rate(cfg))]
    return [replace(cfg, shape=replace(cfg.shape, frames=n)) for n in kept]
