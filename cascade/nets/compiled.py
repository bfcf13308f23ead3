"""A stage's network made faster to launch, for sampling: its blocks compiled, or all of it as CUDA graphs.

Both give each call the prompt without a memory (`Text.once`): what is remembered between calls cannot be part of code
that is compiled, or of a graph, and projecting a prompt again costs a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from cascade.cond import Cond
from cascade.errors import ConfigError
from cascade.text import Text

Replay = Callable[[], object]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


class Compile(Enum):
    """How a stage's network is launched."""

    NONE = "none"
    REGIONAL = "regional"  # torch.compile, block by block: blocks of one shape share their code
    GRAPH = "graph"  # all kernels of a call in one launch

    def check(self, setting: str, device: torch.device) -> None:
        """Raises ConfigError, naming `setting`, if there is no such thing on `device`."""
        if self is Compile.GRAPH and device.type != "cuda":
            raise ConfigError(f"{setting} is graph, which is for CUDA, not for {device.type}", fix=f"{setting}=none")


def compiled(net: nn.Module, how: Compile, backend: str = "inductor") -> nn.Module:
    """`net`, launched as `how` says. It compiles at the first call of each shape, which takes seconds to minutes."""
    if how is Compile.NONE:
        return net
    if how is Compile.GRAPH:
        return Graphed(net, CudaCapture())
    import torch._dynamo.config

    found = regions(net)
    # Blocks share the code of one class, which is compiled again for each shape and each network of a process: past the
    # limit it runs as it is.
    torch._dynamo.config.recompile_limit += 2 * len(found)
    for region in found:
        region.compile(dynamic=False, backend=backend)
    return Plain(net)


def regions(net: nn.Module) -> list[nn.Module]:
    """The modules whose class stands in a list of the network and has parts: its repeated blocks."""
    listed = {child for module in net.modules() if isinstance(module, nn.ModuleList) for child in module}
    kinds = {type(child) for child in listed if not isinstance(child, nn.ModuleList) and any(child.children())}
    return [module for module in net.modules() if type(module) in kinds]


class Plain(nn.Module):
    """The network, told the prompt alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(z, t, cond.with_text(Text(cond.text.tokens, cond.text.mask)), w)
        return out


@dataclass
class Graph:
    """One capture: what it reads, what runs it again, and where its result then stands."""

    inputs: Sequence[Tensor | None]
    replay: Replay
    output: Tensor


class Graphed(Plain):
    """The network as a graph for each set of shapes that it is called with.

    A graph reads and writes fixed memory: what it is given is copied in, what it answers is copied out.
    """

    def __init__(self, net: nn.Module, capture: Capture) -> None:
        super().__init__(net)
        self.capture = capture
        self.graphs: dict[tuple[object, ...], Graph] = {}

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            raise ConfigError("compile is graph, through which no gradient passes", fix="compile=none")
        text = cond.text
        given = (z, t, cond.concat, cond.mask, cond.level, cond.fps, text.tokens, text.mask, cond.segments, w)
        key = tuple(None if x is None else (x.shape, x.dtype) for x in given)
        if key not in self.graphs:
            self.graphs[key] = self.record(given)
        graph = self.graphs[key]
        for mine, x in zip(graph.inputs, given, strict=True):
            if mine is not None and x is not None:
                mine.copy_(x)
        graph.replay()
        return graph.output.clone()

    def record(self, given: Sequence[Tensor | None]) -> Graph:
        inputs = [None if x is None else x.clone() for x in given]
        z, t, concat, mask, level, fps, tokens, real, segments, w = inputs
        cond = Cond(concat, mask, level, fps, Text(tokens, real), segments)  # type: ignore[arg-type]
        return Graph(inputs, *self.capture(lambda: super(Graphed, self).forward(z, t, cond, w)))  # type: ignore[arg-type]


class CudaCapture:
    """Captures CUDA graphs that share their memory: each one's result must be copied before another is replayed."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled and libraries take their workspaces: not while it is recorded
                run()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()
        return graph.replay, out
