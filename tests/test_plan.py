"""Laws of the plan: it counts what runs, refuses what cannot run in one line, and loads no weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chain, changed, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.chain import Chain
from cascade.cli import command
from cascade.codec import Codec, Kind
from cascade.compose import compose
from cascade.config import package_root, parse, plugin
from cascade.errors import CascadeError, ConfigError, InputError
from cascade.nets.unet_config import LevelSpec, Mixer
from cascade.noise import Noise, sample_id
from cascade.planning import plan as planning
from cascade.planning.count import Count, Host, held, stored
from cascade.planning.plan import Plan, measure, plan, verb
from cascade.sampling.sampler import Rule, Sampler
from cascade.stage import Stage
from cascade.text import TextConfig, known_width
from cascade.text.encoders import local_file
from cascade.video import Shape, Video
from cascade.windows import Join, Windows

CHAINS = sorted(path.stem for path in (package_root() / "conf" / "chain").glob("*.yaml"))
FIELDS = {
    "name": str, "frames": int, "height": int, "width": int, "fps": float, "params": int, "flops": int,
    "evaluations": int, "peak_bytes": int,
}  # fmt: skip
TOKENS = 5
TEXT = TextConfig(max_tokens=TOKENS)
Make = Callable[..., Any]


@cache
def composed(name: str) -> dict[str, Any]:
    return compose("plan", [f"chain={name}"])


def tree(name: str = "tiny", **changes: Any) -> dict[str, Any]:
    """The settings of `cascade plan chain=<name>`, changed at dotted paths ("/" for ".")."""
    return changed(composed(name), changes)


def peak(cfg: Any, host: Host | None = None) -> int:
    rule: Any = plugin(cfg.kind)
    return held(cfg, rule, TOKENS, host or Host()).peak


def numbers(cfg: Any) -> Any:
    rule: Any = plugin(cfg.kind)
    return measure(cfg, rule, TEXT)


# every chain


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_plans_with_its_true_parameters(name: str) -> None:
    made, found = chain(name), planned(name).stages
    assert [stage.name for stage in found] == [cfg.name for cfg in made.stages]
    for cfg, rule, stage in zip(made.stages, made.rules, found, strict=True):
        with torch.device("meta"):
            net = Stage(cfg, rule).net
        assert stage.params == sum(p.numel() for p in net.parameters())
        assert (stage.frames, stage.height, stage.width) == (cfg.shape.frames, cfg.shape.height, cfg.shape.width)
        assert stage.flops > 0 and stage.peak_bytes > 4 * stage.params
        assert stage.evaluations >= cfg.sampler.steps


def test_json_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    command(["plan", "chain=tiny", "format=json"])
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["stages", "others"]
    for stage in shown["stages"]:
        assert {key: type(value) for key, value in stage.items()} == FIELDS
    assert [stage["name"] for stage in shown["stages"]] == ["base", "tsr", "ssr1", "interp", "ssr2"]
    (text,) = shown["others"]
    assert text["name"] == "tiny/text" and text["kind"] == "text encoder" and text["params"] > 0


def test_the_table_has_a_line_for_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    verb(tree(stages=["base", "tsr"]))()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["stage", "base", "tsr", "all"]
    assert len({len(line) for line in lines[:4]}) == 1 and lines[-1].startswith("text encoder: tiny/text, ")


def test_weights_need_not_be_there() -> None:
    settings: dict[str, Any] = {"stages": ["base"], "base/weights": "/nowhere", "text/encoder": "/nowhere/either"}
    (text,) = plan(chain(**settings)).others
    assert text.params is None


def test_an_encoder_that_is_not_here_is_said_not_guessed(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "cascade"):
        settings: dict[str, Any] = {"stages": ["base"], "text/encoder": "/nowhere", "format": "json"}
        verb(tree(**settings))()
    assert "was not checked" in caplog.text and json.loads(capsys.readouterr().out)["others"][0]["params"] is None


def test_the_width_of_embeddings_is_known_without_the_encoder(tmp_path: Path) -> None:
    assert known_width(TextConfig()) == 128 and local_file("tiny/text", "nothing.json") is None
    for absent in ("/nowhere", "nobody/has-this-one", "not--a-name", "tiny/no such"):
        assert known_width(TextConfig(encoder=absent)) is None and local_file(absent, "config.json") is None
    assert known_width(TextConfig(store=str(tmp_path))) is None
    (tmp_path / "index.json").write_text(json.dumps({"encoder": "x", "width": 6, "max_tokens": 8}))
    assert known_width(TextConfig(store=str(tmp_path))) == 6
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no d_model"):
        known_width(TextConfig(encoder=str(tmp_path)))


# what is counted


def test_work_grows_with_the_frames_but_for_what_a_clip_needs_once(stage_config: Make) -> None:
    once = 2 * (3 * 8 * 8 + 6 * 8)  # linear maps of time, level, fps and text, width 8; text width 6
    few, many, more = (
        numbers(stage_config("base", shape=Shape(frames=f, height=8, width=8))).flops - once for f in (4, 8, 12)
    )
    assert (many, more) == (2 * few, 3 * few)


@pytest.mark.parametrize("head", [4, 8])
@pytest.mark.parametrize("part", ["spatial_attention", "text_attention", "temporal"])
def test_attention_is_counted_as_by_hand(stage_config: Make, net_config: Make, part: str, head: int) -> None:
    def flops(**changes: Any) -> int:
        level = LevelSpec(channels=8, **({"mixer": Mixer.NONE} | changes))
        return int(numbers(stage_config("base", net=net_config(levels=[level], head=head))).flops)

    blocks, c, f, hw, width, n = 3, 8, 4, 64, 6, TOKENS + 1  # n: the tokens and the null token
    by_hand = {
        "spatial_attention": 4 * 2 * f * hw * c * c + 4 * f * hw * hw * c,
        "text_attention": 2 * 2 * f * hw * c * c + 2 * n * width * 2 * c + 4 * f * hw * n * c,
        "temporal": 4 * 2 * f * hw * c * c + 4 * hw * f * f * c,
    }
    changed = {"mixer": Mixer.ATTN} if part == "temporal" else {part: True}
    assert flops(**changed) - flops() == blocks * by_hand[part]


def test_a_clip_in_windows_costs_the_sum_of_its_windows(stage_config: Make) -> None:
    part = stage_config("base")
    whole = stage_config("base", shape=Shape(frames=12, height=8, width=8), windows=Windows(frames=4))
    assert numbers(whole).flops == 3 * numbers(part).flops


def test_windows_apart_cost_as_much_as_clips_of_their_own(stage_config: Make) -> None:
    def flops(frames: int, windows: Windows) -> int:
        return int(numbers(stage_config("ssr", shape=Shape(frames=frames, height=8, width=8), windows=windows)).flops)

    apart = flops(10, Windows(frames=4, rule=Join.APART))
    assert apart == 2 * flops(4, Windows()) + flops(2, Windows())


def test_latents_are_smaller_than_pixels(stage_config: Make, net_config: Make) -> None:
    codec = Codec(kind=Kind.LATENT, weights="/nowhere", channels=3, stride=2)
    big, small = (stage_config("base", codec=c, shape=Shape(frames=4, height=16, width=16)) for c in (Codec(), codec))
    assert numbers(small).flops == numbers(stage_config("base")).flops < numbers(big).flops
    rule: Any = plugin("base")
    made = plan(Chain([small], [rule], TextConfig(encoder="/nowhere")))
    assert [(other.kind, other.name, other.params) for other in made.others[1:]] == [("autoencoder", "/nowhere", None)]


def test_memory_is_what_is_alive_at_once() -> None:
    count, module = Count(), torch.nn.Linear(10, 10, bias=False, device="meta")
    count.add(module.weight)
    with count:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100).transpose(0, 1)
        b.add_(1)
        assert count.peak == 400 + 4000, "parameters count, views and work in place do not"
        c = a + 1
        del a, b
        d = c + 1
        del c
        d = torch.cat([d, d])
    assert count.peak == 400 + 3 * 4000 and count.largest == 2000


def test_scores_of_attention_are_never_whole(stage_config: Make, net_config: Make) -> None:
    net = net_config(levels=[LevelSpec(channels=8, mixer=Mixer.NONE, spatial_attention=True)])
    shape = Shape(frames=4, height=64, width=64)
    assert numbers(stage_config("base", net=net, shape=shape)).peak_bytes < 4 * 4096 * 4096


LEVELS = [LevelSpec(channels=16, mixer=Mixer.BOTH, text_attention=True), LevelSpec(channels=16, spatial_attention=True)]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("base", {"sampler": Sampler(steps=4, guidance=2, rule=Rule.DPMPP_2M)}),
        ("tsr", {"sampler": Sampler(steps=3, rule=Rule.ANCESTRAL)}),
        ("ssr", {"sampler": Sampler(steps=2), "windows": Windows(frames=3, overlap=1), "augment": 0.1}),
        ("ssr", {"sampler": Sampler(steps=4, rule=Rule.HEUN), "w_range": [0.0, 2.0]}),
    ],
)
@pytest.mark.parametrize("clips", [1, 2])
def test_what_is_counted_without_data_is_what_a_real_run_holds(
    kind: str, changes: dict[str, Any], clips: int, make_stage: Make, net_config: Make, encode: Make, one_thread: None
) -> None:
    """The same count of real tensors; what is in noise, known frames and text is in both."""
    net = net_config(levels=LEVELS)
    stage = make_stage(kind, shape=Shape(frames=6, height=16, width=16), net=net, train=None, **changes)
    stage.net.requires_grad_(False)
    count, takes = Count(), stage.rule.takes(stage.cfg)
    for parameter in stage.net.parameters():
        count.add(parameter)
    with count:
        text = encode(["a red circle moves"] * clips)
        frames = torch.zeros(clips, 3, takes.frames, takes.height, takes.width)
        low = None if kind == "base" else Video(frames, 4.0)
        stage.sample(low, text, None, Noise(0, kind, ("a", "b")[:clips]))
    assert peak(stage.cfg, Host(clips=clips)) == pytest.approx(count.peak, rel=0.02)


def test_memory_knows_guidance_precision_and_clips(stage_config: Make, net_config: Make) -> None:
    net = net_config(levels=[LevelSpec(channels=64)])
    cfg = stage_config("base", net=net, shape=Shape(frames=8, height=16, width=16))
    plain = peak(cfg)
    assert peak(replace(cfg, sampler=Sampler(steps=3, guidance=2.0))) > plain, "the conditional x waits for the other"
    assert plain * 0.5 < peak(cfg, Host(dtype="bfloat16")) < plain * 0.8, "weights and state stay in float32"
    assert peak(cfg, Host(dtype="bfloat16")) == peak(replace(cfg, dtype="bfloat16"))
    assert plain * 1.5 < peak(cfg, Host(clips=2)) < plain * 2.5
    assert peak(replace(cfg, sampler=Sampler(steps=1000))) == peak(replace(cfg, sampler=Sampler(steps=3)))


def test_a_latent_stage_counts_the_pixels_that_come_out(stage_config: Make) -> None:
    codec = Codec(kind=Kind.LATENT, weights="/nowhere", channels=3, stride=8)
    cfg = stage_config("base", codec=codec, shape=Shape(frames=4, height=256, width=256))
    pixels = 4 * 3 * 4 * 256 * 256
    assert 2 * pixels <= peak(cfg) < 3 * pixels, "decoded, then clamped; what is inside is 64 times smaller"


def test_no_tensor_of_the_shipped_chain_is_too_large_to_count_in_32_bits() -> None:
    made = chain()
    for cfg, rule in zip(made.stages, made.rules, strict=True):
        assert held(cfg, rule, made.text.max_tokens, Host()).largest < 2**31, cfg.name


@pytest.mark.parametrize(
    "sampler, w_range, expected",
    [
        (Sampler(steps=8), None, 8),
        (Sampler(steps=8, guidance=2), None, 16),
        (Sampler(steps=8, guidance=2), [0.0, 4.0], 8),
        (Sampler(steps=6, guidance=4, guidance_low=0, guidance_constant=2), None, 10),
        (Sampler(steps=4, guidance=2, rule=Rule.HEUN), None, 14),
        (Sampler(steps=4, guidance=2, guidance_low=0, rule=Rule.HEUN), None, 11),
    ],
)
def test_evaluations_are_the_calls_of_the_network(
    make_stage: Make, encode: Make, sampler: Sampler, w_range: list[float] | None, expected: int
) -> None:
    stage = make_stage("base", sampler=sampler, w_range=w_range, shape=Shape(frames=1, height=4, width=4))
    calls: list[int] = []
    stage.net.register_forward_hook(lambda *_: calls.append(1))
    stage.sample(None, encode(["a"]), None, Noise(0, "base", (sample_id("a"),)))
    assert len(calls) == numbers(stage.cfg).evaluations == expected


def test_a_student_is_known_by_what_stands_beside_its_weights(tmp_path: Path, stage_config: Make) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"w_range": [0.0, 4.0]}))
    teacher = stage_config("base", sampler=Sampler(steps=4, guidance=2))
    assert numbers(teacher).evaluations == 8
    assert numbers(replace(teacher, weights=str(tmp_path))).evaluations == 4


def test_numbers_in_a_file_are_counted_from_its_header(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, 3), "decoder.b": torch.zeros(7)}, tmp_path / "x.safetensors")
    assert stored(tmp_path / "x.safetensors") == 13 and stored(tmp_path / "x.safetensors", ("decoder.",)) == 6
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="not a safetensors file"):
        stored(tmp_path / "x.safetensors")


# what is refused

LATENT = {"kind": "latent", "weights": "/nowhere", "channels": 4, "stride": 8}
BROKEN = {
    "frames": ({"tsr/shape": {"frames": 12, "height": 32, "width": 32}}, "tsr takes 6x32x32, but base gives 8x32x32"),
    "height": ({"base/shape/height": 16}, "tsr takes 8x32x32, but base gives 8x16x32"),
    "width": ({"base/shape/width": 24}, "base.shape.width=32"),
    "fps": ({"tsr/fps": 6}, "tsr.fps=8"),
    "a name twice": ({"stages": ["base", "tsr", "tsr"]}, "two stages have one name"),
    "no such stage": ({"stages": ["base", "upscale"]}, "stages names 'upscale', which has no settings"),
    "no such kind": ({"base/kind": "warp"}, "there is no stages/warp.py"),
    "no kind": ({"base": {"name": "base"}}, "base: kind is missing"),
    "no settings": ({"base": 3}, "base is 3, expected the settings of a stage"),
    "channels": ({"tsr/net/channels": 1}, "tsr takes videos of 1 channels, but base gives 3"),
    "text width": ({"base/net/text": 64}, "base.net.text=128"),
    "window within overlap": ({"ssr1/windows": {"frames": 4, "overlap": 4}}, "frames is 4 and overlap 4"),
    "window, rate": ({"tsr/windows/frames": 15}, "windows.frames is 15, expected a multiple of 2"),
    "window, rate, plus one": ({"interp/windows/frames": 30}, "expected 1 more than a multiple of 2"),
    "window below rate": ({"interp/windows": {"frames": 1, "overlap": 0}}, "interp.windows.frames=3"),
    "size": ({"base/shape/height": 36}, "shape.height is 36, expected a multiple of 8"),
    "factor": ({"interp/shape/frames": 30, "interp/train": None}, "factor 2 makes 29 frames of 15"),
    "no frames": ({"base/shape/frames": 0}, "frames is 0"),
    "empty": ({"stages": []}, "stages is empty"),
    "needs an input": ({"stages": ["tsr", "ssr1"]}, "tsr needs a video to add frames to, and no stage"),
    "unknown setting of a stage": ({"base/stepz": 3}, "base.stepz"),
    "unknown setting": ({"sed": 3}, "unknown setting sed"),
    "unknown section": ({"bass": {"fps": 3}}, "unknown setting bass. Fix: base"),
    "format": ({"format": "xml"}, "format is 'xml', expected table or json"),
    "latent channels": ({"base/codec": LATENT}, "net.channels is 3, expected codec.channels, 4"),
}  # fmt: skip


@pytest.mark.parametrize("changes, expected", BROKEN.values(), ids=BROKEN)
def test_a_broken_chain_is_refused_in_one_line(
    changes: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measure", lambda *_: pytest.fail("measured before it was checked"))
    with pytest.raises(CascadeError) as caught:
        verb(tree(**changes))()
    assert caught.value.code == 2 and expected in str(caught.value)
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


def mostly(*legal: Any, wrong: Any) -> st.SearchStrategy[Any]:
    """One of `legal`, now and then `wrong`."""
    return st.sampled_from([*legal * 6, wrong])


LEVEL = st.fixed_dictionaries(
    {
        "channels": mostly(8, 16, 24, wrong=12),
        "blocks": mostly(1, 2, wrong=0),
        "mixer": st.sampled_from([mixer.value for mixer in Mixer]),
        "spatial_attention": st.booleans(),
        "text_attention": st.booleans(),
    }
)
NET = {
    "levels": st.lists(LEVEL, min_size=1, max_size=3),
    "patch": mostly(1, 2, wrong=3),
    "embedding": mostly(2, 8, 10, wrong=7),
    "head": mostly(4, 8, 64, wrong=5),
    "text": mostly(1, 3, wrong=0),
    "channels": mostly(1, 3, 4, wrong=0),
    "frame_position": st.booleans(),
}
STAGE = st.fixed_dictionaries(
    {
        "shape": st.fixed_dictionaries(
            {
                "frames": mostly(1, 4, 7, 10, wrong=0),
                "height": mostly(12, 24, wrong=6),
                "width": mostly(12, 24, 36, wrong=9),
            }
        ),
        "net": st.fixed_dictionaries(NET),
        "windows": st.fixed_dictionaries({"frames": mostly(0, 4, 7, wrong=3), "overlap": mostly(0, wrong=3)}),
        "w_range": st.sampled_from([None, [0.0, 2.0]]),
    }
)
OWN: dict[str, dict[str, int]] = {"base": {}, "tsr": {"factor": 2}, "ssr": {"scale": 3}, "interp": {"factor": 3}}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(OWN)), STAGE)
def test_what_is_accepted_runs(kind: str, drawn: dict[str, Any]) -> None:
    """One evaluation on the meta device: no setting that passes the check fails later for its shape."""
    common = {"name": kind, "kind": kind, "fps": 8, "diffusion": {}, "sampler": {"steps": 2, "guidance": 1.0}}
    rule: Any = plugin(kind)
    try:
        cfg = parse({**common, **OWN[kind], **drawn}, rule.Config)
        Chain([cfg], [rule], TextConfig(encoder="/nowhere")).check()
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert rule.output(rule.takes(cfg), cfg) == cfg.shape
    assert numbers(cfg).evaluations == (2 if cfg.w_range else 4)


def test_a_plan_is_data() -> None:
    made = plan(chain(stages=["base"]))
    assert isinstance(made, Plan) and made == plan(chain(stages=["base"])) and list(made.data()) == ["stages", "others"]
