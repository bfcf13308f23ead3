"""A network launched in another way says the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from cascade.chain import Chain, Device
from cascade.cond import Cond
from cascade.errors import ConfigError
from cascade.loading import launched
from cascade.nets.compiled import Compile, Graphed, Replay, compiled, regions
from cascade.nets.unet import Block, VideoUNet
from cascade.nets.unet_config import LevelSpec, Mixer
from cascade.noise import generator
from cascade.text import Text, TextConfig
from cascade.windows import Windows

Make = Callable[..., Any]


@pytest.fixture
def net(net_config: Make, shaken: Make) -> VideoUNet:
    level = LevelSpec(channels=8, mixer=Mixer.BOTH, text_attention=True)
    made: VideoUNet = shaken(VideoUNet(net_config(levels=[level], text=6))).eval()
    return made


def asked(name: str, batch: int = 1, frames: int = 3, segments: bool = False) -> tuple[Tensor, Tensor, Cond]:
    """What a network is given: clips, times and all that conditions them, different for each `name`."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator(name, *shape))

    shape = (batch, 3, frames, 8, 8)
    text = Text(draw(batch, 4, 6), torch.arange(4).expand(batch, -1) < 3).remembering()
    numbers = (torch.arange(frames) // 2).expand(batch, -1) if segments else None
    cond = Cond(draw(*shape), torch.ones(batch, 1, frames, 1, 1), draw(batch), draw(batch) + 4, text, numbers)
    return draw(*shape[:2], frames, 8, 8) - 0.5, draw(batch, 1)[:, 0], cond


def recorded(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """A graph as far as memory goes: a replay reads the tensors that `run` closes over and overwrites its result."""
    with torch.no_grad():
        out = run()

    def replay() -> None:
        with torch.no_grad():
            out.copy_(run())

    return replay, out


def test_a_graph_reads_every_input_and_gives_its_answer_away(net: VideoUNet) -> None:
    graphed = Graphed(net, recorded)
    calls = [asked("a"), asked("b"), asked("c", segments=True), asked("d", batch=2), asked("a"), asked("e", frames=4)]
    with torch.no_grad():
        answers = [graphed(*call) for call in calls]
        told = graphed(*calls[0], torch.ones(1))
        assert all(call[2].text.memory == {} for call in calls)  # a graph must not read what lies outside of it
        for call, answer in zip(calls, answers, strict=True):
            assert torch.equal(answer, net(*call))
        assert torch.equal(told, net(*calls[0], torch.ones(1))) and not torch.equal(told, answers[0])
    assert len(graphed.graphs) == 5  # "a", "b" and "a" again have one shape


def test_a_graph_has_no_gradient_and_says_so(net: VideoUNet) -> None:
    with pytest.raises(ConfigError, match="no gradient"):
        Graphed(net, recorded)(*asked("a"))


def test_regions_are_the_blocks(net: VideoUNet) -> None:
    assert set(regions(net)) == {module for module in net.modules() if isinstance(module, Block)}
    assert regions(nn.Sequential(nn.Linear(2, 2))) == []


def test_compiled_blocks_are_whole_and_say_the_same(net: VideoUNet) -> None:
    """By PyTorch's own kernels: inductor's, which take minutes to compile, are compared in docs/performance.md."""
    z, t, cond = asked("a")
    with torch.no_grad():
        expected = net(z, t, cond)
        counters.clear()
        regional = compiled(net, Compile.REGIONAL, backend="aot_eager")
        assert (regional(z, t, cond) - expected).abs().max() < 1e-5
    assert 0 < counters["stats"]["unique_graphs"] <= len(regions(net)) and not counters["graph_break"]


def test_a_stage_says_how_it_is_launched(stage_config: Make, make_stage: Make) -> None:
    cfg = stage_config("base", compile=Compile.GRAPH, windows=Windows())
    chain = Chain([cfg], [make_stage("base").rule], TextConfig())
    with pytest.raises(ConfigError, match=r"base\.compile is graph, which is for CUDA, not for cpu") as error:
        chain.runs_on(Device(device="cpu"))
    assert error.value.fix == "base.compile=none"
    stage = make_stage("base")
    net = stage.net
    assert launched(stage, Device(device="cpu")).net is net
