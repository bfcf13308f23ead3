"""A network launched in another way says the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from cascade import loading
from cascade.chain import Chain, Device
from cascade.cond import Cond
from cascade.errors import ConfigError
from cascade.loading import launched
from cascade.nets.compiled import Compile, Graphed, Replay, compiled, regions
from cascade.nets.unet import Block, VideoUNet
from cascade.nets.unet3d_config import Heads, Level3D, UNet3DConfig
from cascade.nets.unet_config import LevelSpec, Mixer
from cascade.noise import Noise, generator
from cascade.sampling.sampler import Rule, Sampler
from cascade.stage import Stage
from cascade.text import Text, TextConfig
from cascade.video import Shape, Video
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


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled to PyTorch's own kernels."""
    monkeypatch.setattr(loading, "compiled", partial(compiled, backend="aot_eager"))


def sampled(stage: Stage, encode: Make) -> Tensor:
    size = stage.rule.takes(stage.cfg)
    frames = torch.rand(1, 3, size.frames, size.height, size.width, generator=generator("low")) * 2 - 1
    low = None if stage.cfg.kind == "base" else Video(frames, 4.0)
    return stage.sample(low, encode(["a red circle"]), encode(["a blue square"]), Noise(0, "a", ("a",))).frames


def pair(how: Compile, make: Callable[[Compile], Stage]) -> tuple[Stage, Stage]:
    """A stage as it is, and one launched as `how` says; graphs as far as memory goes."""
    plain, fast = make(Compile.NONE), make(how)
    if how is Compile.GRAPH:
        fast.call = Graphed(fast.net, recorded)
    for stage in (plain, fast):
        stage.net.eval().requires_grad_(False)
        launched(stage, Device(device="cpu"))
    assert fast.call is not fast.net
    return plain, fast


@pytest.mark.parametrize("how", [Compile.REGIONAL, Compile.GRAPH])
def test_a_stage_launched_in_another_way_sees_as_few_frames_at_once(
    how: Compile, by_torch: None, make_stage: Make, net_config: Make, encode: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As set, and where a tensor would be too large."""
    settings: dict[str, Any] = {
        "net": net_config(levels=[LevelSpec(channels=8)]),
        "shape": Shape(frames=24, height=8, width=8),
        "sampler": Sampler(steps=2, guidance=1.0),
    }
    for frames in (9, 0):
        plain, fast = pair(how, lambda how, n=frames: make_stage("ssr", 0.2, compile=how, frames_at_once=n, **settings))
        assert fast.reach == plain.reach == 3
        if not frames:
            monkeypatch.setattr("cascade.stage.ELEMENTS", 14 * plain.net.elements(8, 8))  # type: ignore[operator]
        sizes: list[int] = []
        fast.net.register_forward_pre_hook(lambda _, given, sizes=sizes: sizes.append(given[0].shape[2]))
        assert (sampled(fast, encode) - sampled(plain, encode)).abs().max() < 1e-5
        assert set(sizes) == {frames or 13}


@pytest.mark.parametrize("how", [Compile.REGIONAL, Compile.GRAPH])
def test_a_stage_launched_in_another_way_takes_the_learned_variance(
    how: Compile, by_torch: None, make_stage: Make, encode: Make
) -> None:
    levels, heads = [Level3D(channels=32, blocks=1)], Heads(number=2)
    net = UNet3DConfig(arch="unet3d", channels=3, levels=levels, embedding=8, text=6, heads=heads, variance=True)
    sampler = Sampler(steps=3, rule=Rule.ANCESTRAL, learned=True, guidance=1.0)
    plain, fast = pair(how, lambda how: make_stage("base", 0.05, net=net, sampler=sampler, compile=how))
    assert (sampled(fast, encode) - sampled(plain, encode)).abs().max() < 1e-5


def test_launching_twice_changes_nothing(by_torch: None, make_stage: Make) -> None:
    stage = make_stage("base", compile=Compile.REGIONAL)
    launched(stage, Device(device="cpu"))
    net, call, limit = stage.net, stage.call, torch._dynamo.config.recompile_limit
    launched(stage, Device(device="cpu"))
    assert stage.net is net and stage.call is call and torch._dynamo.config.recompile_limit == limit


def test_graphs_go_when_the_weights_move(make_stage: Make, encode: Make) -> None:
    """A graph has the weights' addresses."""
    stage = make_stage("base")
    stage.net.requires_grad_(False)
    stage.call = graphed = Graphed(stage.net, recorded)
    sampled(stage, encode)
    assert len(graphed.graphs) == len(stage.to(torch.device("cpu")).call.graphs) > 0
    stage.to(torch.device("meta"))
    assert not graphed.graphs
