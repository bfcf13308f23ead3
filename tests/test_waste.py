"""Laws of a sampling run's economy: nothing is made twice, a device is never waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cascade.clipfiles import VIDEO, commit_stage, finished
from cascade.cond import Cond
from cascade.diffusion import Diffusion
from cascade.making import predictor
from cascade.nets.layers import TextAttention
from cascade.nets.unet_config import LevelSpec, Mixer
from cascade.noise import Noise, Shared, Stream, generator, sample_id
from cascade.sampling.sampler import Rule, Sampler, Threshold, Watch, _moved, sample
from cascade.store import reading
from cascade.text import Text
from cascade.video import Video
from cascade.windows import Windows

PROMPT = "a red circle"
NOISE = Noise(1, "stage", (sample_id(PROMPT),))
GUIDED = Sampler(steps=3, guidance=2.0)
SHAPE = (1, 3, 4, 8, 8)
Make = Callable[..., Any]


@pytest.fixture
def stage(make_stage: Make, net_config: Make) -> Any:
    """A base stage with text, guided, in two windows."""
    level = {"mixer": Mixer.BOTH, "text_attention": True}
    net = net_config(levels=[LevelSpec(channels=8, **level)])
    return make_stage("base", 0.2, net=net, sampler=GUIDED, windows=Windows(frames=2, overlap=0))


def projections(stage: Any) -> list[int]:
    """How often the stage's network projects text, by what runs next: one number for each of its text layers."""
    layers = [layer for layer in stage.net.modules() if isinstance(layer, TextAttention)]
    calls = [0] * len(layers)

    def count(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[i] += 1

        return hook

    for i, layer in enumerate(layers):
        layer.kv.register_forward_hook(count(i))
    return calls


# text ----------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_projected_once_in_all_steps_windows_and_branches(
    stage: Any, encode: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, text = projections(stage), encode([PROMPT])
    once = stage.sample(None, text, None, NOISE)
    assert calls == [2] * 3  # with the prompt and without; down, middle and up
    assert text.memory is None
    monkeypatch.setattr(Text, "remembering", lambda self: self)
    again = stage.sample(None, text, None, NOISE)
    assert calls == [2 + 2 * 3 * 2] * 3  # branches x steps x windows
    assert torch.equal(once.frames, again.frames)


def test_only_the_text_itself_remembers(encode: Make) -> None:
    text = encode([PROMPT, "a blue square"]).remembering()
    (first,) = text.once("key", lambda: (torch.ones(1),))
    assert text.once("key", lambda: (torch.zeros(1),))[0] is first
    assert not text.once("other", lambda: (torch.zeros(1),))[0].any()
    for derived in (text[:1], text.pad(9), text.to("cpu"), text.drop(torch.tensor([True, False])), Text.cat([text])):
        assert derived.memory is None


def test_what_is_remembered_has_no_gradient_and_training_remembers_nothing(stage: Any, encode: Make) -> None:
    layer = next(layer for layer in stage.net.modules() if isinstance(layer, TextAttention))
    calls, text = projections(stage), encode([PROMPT])
    assert all(
        part.grad_fn is None for part in text.remembering().once("k", lambda: layer.context(text, torch.float32))
    )
    cond = Cond(torch.zeros(SHAPE), torch.zeros(1, 1, 4, 1, 1), torch.zeros(1), torch.full((1,), 8.0), text)
    for step in (1, 2):
        loss = stage.denoise(torch.ones(SHAPE), torch.full((1,), 0.5), cond).square().sum()
        loss.backward()
        assert calls[0] == 1 + 2 * step and layer.kv.weight.grad.any()


# guidance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [None, "two white stars stand still"])
def test_both_branches_in_one_batch_give_the_same_with_half_the_calls(
    negative: str | None, stage: Any, encode: Make
) -> None:
    sizes: list[int] = []
    stage.net.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    without = None if negative is None else encode([negative])
    apart = stage.sample(None, encode([PROMPT]), without, NOISE)
    assert sizes == [1] * (2 * 3 * 2)
    stage.cfg = replace(stage.cfg, sampler=replace(GUIDED, joint=True))
    sizes.clear()
    joint = stage.sample(None, encode([PROMPT]), without, NOISE)
    assert sizes == [2] * (3 * 2)
    assert (joint.frames - apart.frames).abs().max() < 1e-5


# waiting -------------------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Shapes of what comes from the CPU onto the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        if isinstance(out, Tensor) and out.is_meta and any(not x.is_meta for x in given):
            self.shapes.append(tuple(out.shape))
        return out


def copies_of(monkeypatch: pytest.MonkeyPatch, settings: Sampler, steps: Any) -> list[tuple[int, ...]]:
    """What a run on the meta device is sent. There are no values there: to ask for one (`item`, `if tensor`) is an
    error."""
    read: list[int] = []
    monkeypatch.setattr(Watch, "report", lambda watch: read.append(len(watch.seen)))
    with Copies() as copies:
        out = sample(Diffusion(), steps, settings, NOISE, SHAPE, device="meta")
    assert out.is_meta and out.shape == SHAPE
    assert len(read) == 1  # once, when all is launched
    return copies.shapes


@pytest.mark.parametrize("rule", Rule)
def test_the_rules_read_no_value_and_are_sent_nothing_but_noise(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Sampler(steps=3, rule=rule, threshold=Threshold.DYNAMIC)
    sent = copies_of(monkeypatch, settings, lambda z, t, step: z * 0.5)
    assert sent == [SHAPE] * (1 + 2 * (rule in (Rule.ANCESTRAL, Rule.STOCHASTIC)))


@pytest.mark.parametrize("joint", [False, True])
def test_guided_windows_of_the_network_read_no_value_and_are_sent_nothing(
    joint: bool, stage: Any, encode: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.net.to("meta")
    blank, one = torch.zeros(SHAPE, device="meta"), torch.ones(1, device="meta")
    cond = Cond(blank, blank[:, :1], one, one, encode([PROMPT]).to("meta"))
    settings = replace(GUIDED, steps=2, joint=joint)
    dropped = cond.with_text(Text(cond.text.tokens, cond.text.mask))
    assert copies_of(monkeypatch, settings, predictor(stage, cond, dropped, settings)) == [SHAPE]


def test_what_is_not_finite_is_found_when_it_is_read() -> None:
    watch = Watch(4)
    watch(torch.ones(3), 0)
    later = Watch(4)
    later.seen = [(0, 3, torch.tensor(3)), (1, 3, torch.tensor(1)), (2, 3, torch.tensor(0))]
    with pytest.raises(Exception, match="step 2 of 4: 2 of 3 values"):
        later.report()
    later.report()  # what was reported is gone


@pytest.mark.parametrize(("drawn", "pinned"), [("cpu", True), ("cuda", False)])
def test_noise_is_pinned_where_it_has_to_travel(drawn: str, pinned: bool) -> None:
    """Only memory of the CPU can be: noise that a training draws on a GPU is there already."""
    calls = []

    class Noisy:
        device = torch.device(drawn)

        def contiguous(self) -> Noisy:
            return self

        def pin_memory(self) -> Noisy:
            calls.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> Noisy:
            calls.append(str(device))
            return self

    _moved(Noisy(), torch.device("cuda"))  # type: ignore[arg-type]
    assert calls == ["pinned"] * pinned + ["cuda"]


def test_noise_that_frames_share_has_its_own_memory_where_it_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA pins no memory that several elements have."""
    pinned: list[Tensor] = []

    class Pinned(Exception):
        pass

    def pin_memory(drawn: Tensor) -> Tensor:
        pinned.append(drawn)
        raise Pinned

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    drawn = Shared(Stream(generator("shared")))((2, 3, 4, 5, 6), 0, "start")
    with pytest.raises(Pinned):
        _moved(drawn, torch.device("cuda"))
    assert 0 not in pinned[0].stride() and torch.equal(pinned[0], drawn)


def test_a_clip_is_read_once_if_it_is_the_one_and_not_at_all_if_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = commit_stage(tmp_path / "a", Video(torch.zeros(1, 3, 2, 4, 4), 8.0), "key", preview=False)
    reads: list[str] = []
    real = reading._verified
    monkeypatch.setattr(
        reading, "_verified", lambda folder, name, entry: (reads.append(name), real(folder, name, entry))[1]
    )
    assert finished(tmp_path / "a", "another") is None and not reads
    done = finished(tmp_path / "a", "key")
    assert done is not None and done[1] == made and reads == [VIDEO]
    (tmp_path / "a" / VIDEO).write_bytes(b"damaged")
    assert finished(tmp_path / "a", "key") is None
