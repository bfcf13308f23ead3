"""`Cascade` makes what the commands make, bit for bit, by the names and meanings of diffusers' pipelines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STAGES
from PIL import Image

from cascade import Cascade, api, cli, clipfiles, loading, media
from cascade.config import package_root
from cascade.errors import CascadeError, ConfigError, HostError
from cascade.frames import of_clips, of_images, to_frames
from cascade.noise import generator
from cascade.stage import Stage
from cascade.video import Shape, Video

PROMPT = "a large red circle moves left on a black background"
OTHER = "a small blue square moves up and a large white ring stands still on a gray background"
SEEDED = {"generator": torch.Generator().manual_seed(7)}


@pytest.fixture
def pipe(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cascade:
    monkeypatch.chdir(tmp_path)
    made = Cascade.from_pretrained("mini", config_dir=mini)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def base(pipe: Cascade) -> Cascade:
    return pipe.stages["base"]


def generated(mini: Path, *words: str, stage: str = "interp") -> torch.Tensor:
    """What `cascade generate` makes: the frames of one stage."""
    cli.command(["generate", *words, "out=run", "chain=mini", "--config-dir", str(mini)])
    return clipfiles.read_clip(Path(f"run/stages/{stage}/video.safetensors").read_bytes(), "run").frames


# what comes out is what the commands make ----------------------------------------------------------------------------


def test_the_frames_are_those_of_the_command_and_nothing_is_written(pipe: Any, mini: Path, tmp_path: Path) -> None:
    out = pipe(PROMPT, **SEEDED)
    assert not list(tmp_path.iterdir())
    wanted = generated(mini, f"prompt={PROMPT}", "seed=7")
    assert torch.equal(out.video.frames, wanted) and out.fps == out.video.fps == 8
    assert np.array_equal(out.frames, (wanted * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy())
    assert torch.equal(pipe(PROMPT, **SEEDED).video.frames, wanted)  # nothing is drawn from the generator
    assert torch.equal(pipe(PROMPT).video.frames, generated(mini, f"prompt={PROMPT}"))  # seed 0 without one
    for negative in ("a ring", ""):
        made = pipe(PROMPT, negative, guidance_scale={"base": 3.0}).video.frames
        words = (f"prompt={PROMPT}", f"negative_prompt={negative}", "base.sampler.guidance=2")
        assert torch.equal(made, generated(mini, *words))


def test_a_video_is_the_same_whatever_is_asked_for_beside_it(base: Any) -> None:
    both = base([OTHER, PROMPT], num_videos_per_prompt=2).video.frames
    assert both.shape == (4, 3, 4, 8, 8) and len({clip.numpy().tobytes() for clip in both}) == 4
    assert torch.equal(base([PROMPT, PROMPT]).video.frames, both[2:])
    assert torch.equal(base(OTHER).video.frames, both[:1])


def test_of_several_generators_each_makes_what_it_makes_alone(mini: Path) -> None:
    pair: Any = Cascade.from_pretrained("mini", "stages=[base]", micro_batch=2, config_dir=mini)
    pair.set_progress_bar_config(disable=True)
    seeded = [torch.Generator().manual_seed(seed) for seed in (7, 3, 7)]
    made = pair([PROMPT, OTHER, PROMPT], generator=seeded).video.frames
    copies = pair(PROMPT, num_videos_per_prompt=3, generator=seeded).video.frames
    for number, one in enumerate(seeded):
        assert torch.allclose(
            made[number], pair([PROMPT, OTHER, PROMPT][number], generator=one).video.frames[0], atol=1e-6
        )
        assert torch.allclose(copies[number], pair(PROMPT, generator=one).video.frames[0], atol=1e-6)
    assert not torch.allclose(copies[0], copies[1], atol=1e-2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_inference_steps": 3}, [f"{name}.sampler.steps=3" for name in STAGES]),
        ({"num_inference_steps": {"tsr": 1}}, ["tsr.sampler.steps=1"]),
        ({"guidance_scale": {"base": 3, "ssr": 1.5}}, ["base.sampler.guidance=2", "ssr.sampler.guidance=0.5"]),
    ],
)
def test_steps_and_guidance_are_those_settings(pipe: Any, mini: Path, asked: dict[str, Any], words: list[str]) -> None:
    assert torch.equal(pipe(PROMPT, **asked).video.frames, generated(mini, f"prompt={PROMPT}", *words))


def test_settings_are_those_of_the_command_and_a_call_changes_none(base: Any, mini: Path) -> None:
    three = Cascade.from_pretrained("mini", "stages=[base]", "base.sampler.steps=3", config_dir=mini)
    three.set_progress_bar_config(disable=True)
    before = base(PROMPT).video.frames
    after: Any = three(PROMPT)
    assert torch.equal(after.video.frames, base(PROMPT, num_inference_steps=3).video.frames)
    assert not torch.equal(after.video.frames, before) and torch.equal(base(PROMPT).video.frames, before)


def test_one_guidance_scale_is_for_the_stages_that_are_guided(mini: Path) -> None:
    guided = Cascade.from_pretrained("mini", "tsr.sampler.guidance=1", config_dir=mini)
    chain = guided._set(None, 4.0)
    assert [cfg.sampler.guidance for cfg in chain.stages] == [0, 3, 0, 0]
    for none in (1, 1.0, 0.5, 0):  # as in diffusers
        for scale in (none, {"tsr": none}):
            assert [cfg.sampler.guidance for cfg in guided._set(None, scale).stages] == [0, 0, 0, 0]


def test_precision_is_that_of_the_command(pipe: Any, mini: Path) -> None:
    assert pipe.to("cpu", torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16 and pipe.device.type == "cpu"
    assert torch.equal(pipe(PROMPT).video.frames, generated(mini, f"prompt={PROMPT}", "dtype=bfloat16"))
    assert Cascade.from_pretrained("mini", config_dir=mini, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to(dtype=torch.float32).dtype == torch.float32


# a part of the chain -------------------------------------------------------------------------------------------------


def test_the_stages_one_by_one_are_the_chain(pipe: Any) -> None:
    whole, video = pipe([PROMPT, OTHER]).video, None
    for name, stage in pipe.stages.items():
        video = stage([PROMPT, OTHER], video=video).video
        if name == "tsr":
            rest = pipe.since("ssr")([PROMPT, OTHER], video=video).video
    assert torch.equal(video.frames, whole.frames) and torch.equal(rest.frames, whole.frames)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_frames_of_every_kind_go_in_again(pipe: Any, output_type: str) -> None:
    before = pipe.stages["base"]([PROMPT, OTHER])
    frames = to_frames(before.video.frames, output_type)
    after = pipe.stages["tsr"]([PROMPT, OTHER], video=frames)
    error = 1 / 255 if output_type == "pil" else 1e-6
    assert (after.video.frames[:, :, ::2] - before.video.frames).abs().max() <= error and after.fps == 4
    both = pipe.stages["tsr"](PROMPT, video=frames[0], num_videos_per_prompt=2).video.frames  # one clip for all
    assert torch.equal(both[0], after.video.frames[0]) and torch.equal(both[1, :, ::2], both[0, :, ::2])


def test_a_file_enters_in_the_middle_as_it_does_for_the_command(pipe: Any, mini: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    Path("clip.mp4").write_bytes(media.encoded(torch.rand(3, 3, 20, 30, generator=rng) * 2 - 1, 6.0, ".mp4"))
    wanted = generated(mini, f"prompt={PROMPT}", "start=ssr", "input=clip.mp4")
    assert torch.equal(pipe.since("ssr")(PROMPT, video="clip.mp4").video.frames, wanted)


def test_an_image_of_any_kind_and_size_becomes_the_first_frame(base: Any, mini: Path) -> None:
    picture = media.to_bytes(torch.rand(3, 1, 20, 12, generator=generator("picture")) * 2 - 1)[0]
    Image.fromarray(picture).save("first.png")
    wanted = generated(mini, f"prompt={PROMPT}", "image=first.png", stage="base")
    tensor = torch.from_numpy(picture).movedim(-1, 0)
    for image in ("first.png", Image.open("first.png"), picture, tensor):
        assert torch.equal(base(PROMPT, image=image).video.frames, wanted)
    assert torch.allclose(base(PROMPT, image=tensor / 255).video.frames, wanted, atol=1e-5)


@pytest.fixture
def files(pipe: Cascade) -> None:
    """What may be given, as files: two pictures, a clip at another rate and size, a mask."""
    rng = generator("files")
    for name in ("first", "last"):
        Path(f"{name}.png").write_bytes(media.png(torch.rand(3, 20, 12, generator=rng) * 2 - 1))
    clip = torch.rand(3, 9, 20, 30, generator=rng) * 2 - 1  # 5 frames at the base's rate
    Path("clip.mp4").write_bytes(media.encoded(clip, 4.0, ".mp4"))
    hole = torch.full((3, 5, 20, 30), -1.0)
    hole[:, 1:, 4:9, 10:21] = 1
    Path("hole.png").write_bytes(media.png(hole[:, 1]))
    Path("hole.mp4").write_bytes(media.encoded(hole, 2.0, ".mp4"))
    Path("clip.safetensors").write_bytes(clipfiles.video_bytes(Video(clip[None], 4.0)))


def long(mini: Path) -> tuple[Any, list[str]]:
    """The chain, and the command's words for it, with a base that makes window after window."""
    words = ["base.windows.frames=4", "base.windows.overlap=2", "base.windows.rule=extend"]
    made = Cascade.from_pretrained("mini", *words, config_dir=mini)
    made.set_progress_bar_config(disable=True)
    return made, [f"prompt={PROMPT}", *words]


def test_a_last_frame_is_that_of_the_command(pipe: Any, mini: Path, files: None) -> None:
    words = [f"prompt={PROMPT}", "last=last.png"]
    assert torch.equal(pipe(PROMPT, last_image=Image.open("last.png")).video.frames, generated(mini, *words))
    both = pipe(PROMPT, image="first.png", last_image="last.png").video.frames
    assert torch.equal(both, generated(mini, *words, "image=first.png"))


def test_pictures_are_for_all_prompts_or_one_for_each(base: Any, files: None) -> None:
    both = base([PROMPT, OTHER], image=["first.png", Image.open("last.png")], num_videos_per_prompt=2).video.frames
    for number, (prompt, name) in enumerate(((PROMPT, "first.png"), (OTHER, "last.png"))):
        alone = base(prompt, image=name, num_videos_per_prompt=2).video.frames
        assert torch.equal(both[2 * number : 2 * number + 2], alone)


def test_a_clip_goes_on_as_it_does_for_the_command(mini: Path, files: None) -> None:
    pipe, words = long(mini)
    saved = clipfiles.read_clip(Path("clip.safetensors").read_bytes(), "clip")
    for name, clip in (
        ("clip.mp4", "clip.mp4"),
        ("clip.safetensors", saved),
        ("clip.safetensors", Path("clip.safetensors")),
    ):
        made = pipe(PROMPT, video=clip).video.frames
        assert torch.equal(made, generated(mini, *words, f"extend={name}")) and made.shape[2] == 4 * 7 - 1
    made = pipe(PROMPT, video="clip.mp4", last_image="last.png").video.frames
    assert torch.equal(made, generated(mini, *words, "extend=clip.mp4", "last=last.png"))
    base = pipe.stages["base"]
    before = base([PROMPT, OTHER])
    for clip in (before.video, before.frames, to_frames(before.video.frames, "pt")):  # frames without a rate
        after = base([PROMPT, OTHER], video=clip).video.frames
        assert torch.allclose(after[:, :, :4], before.video.frames, atol=1e-6) and after.shape[2] == 6


@pytest.mark.parametrize("name", ["hole.png", "hole.mp4"])
def test_a_hole_is_made_anew_as_it_is_for_the_command(mini: Path, files: None, name: str) -> None:
    pipe, words = long(mini)
    wanted = generated(mini, *words, "input=clip.safetensors", f"mask={name}")
    clip = clipfiles.read_clip(Path("clip.safetensors").read_bytes(), "clip")
    decoded = media.decode(Path(name), fps=2.0).frames
    for mask in (name, decoded.numpy(), [Image.fromarray(one.numpy()).convert("L") for one in decoded]):
        assert torch.equal(pipe(PROMPT, video=clip, mask=mask).video.frames, wanted)


def test_a_longer_video_is_that_of_the_command(mini: Path, files: None) -> None:
    pipe, words = long(mini)
    made = pipe(PROMPT, num_frames=31, last_image="last.png")
    assert made.frames.shape[1] == 31
    assert torch.equal(made.video.frames, generated(mini, *words, "seconds=4", "last=last.png"))
    base = pipe.stages["base"]
    assert torch.equal(base(PROMPT, num_frames=4).video.frames, base(PROMPT).video.frames)
    with pytest.raises(ConfigError, match=r"base: 5 frames at 2 a second, and 5 are given\. Fix: num_frames=27"):
        pipe(PROMPT, num_frames=19, video="clip.mp4")


def test_masks_come_in_every_form() -> None:
    white = torch.rand(3, 6, 5, generator=generator("mask")) > 0.5
    pictures = [Image.fromarray(one.numpy()) for one in white]
    for form in (white[:, None], white[:, None].byte() * 255, white[..., None].numpy(), [*white.float()], pictures):
        assert torch.equal(of_images(form, "mask", grey=True).mean(1) > 0, white)
    for wrong in (white[0, 0], white[:2], "x"):
        with pytest.raises(ValueError, match="expected pictures of one or three colours"):
            of_images(wrong, "mask", grey=True)


# callbacks -----------------------------------------------------------------------------------------------------------


def test_a_callback_sees_every_step_and_changes_nothing_by_itself(pipe: Any) -> None:
    seen: list[tuple[Any, ...]] = []

    def callback(of: Any, step: int, t: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((of is pipe, kwargs["stage"], kwargs["videos"], step, t, tuple(kwargs["latents"].shape)))
        return kwargs

    frames = pipe([PROMPT, OTHER], callback_on_step_end=callback).video.frames
    assert torch.equal(frames, pipe([PROMPT, OTHER]).video.frames)
    shapes = {"base": (4, 8, 8), "tsr": (8, 8, 8), "ssr": (8, 16, 16), "interp": (15, 16, 16)}
    assert seen == [
        (True, name, [number], step, t, (1, 3, *shapes[name]))
        for name in STAGES
        for number in (0, 1)
        for step, t in enumerate((1.0, 0.5))
    ]


def test_a_callback_is_told_which_videos_are_made_at_once(mini: Path) -> None:
    pair = Cascade.from_pretrained("mini", "stages=[base]", micro_batch=2, config_dir=mini)
    pair.set_progress_bar_config(disable=True)
    seen: list[tuple[Any, ...]] = []

    def second(of: Any, step: int, t: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, kwargs["videos"], len(kwargs["latents"])))
        return kwargs

    assert pair([PROMPT, OTHER, PROMPT], callback_on_step_end=second).frames.shape[0] == 3  # type: ignore[union-attr]
    assert seen == [(0, [0, 1], 2), (1, [0, 1], 2), (0, [2], 1), (1, [2], 1)]


def test_what_a_callback_returns_goes_on(base: Any) -> None:
    def flat(of: Any, step: int, t: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.full_like(kwargs["latents"], 0.25)} if step == 1 else {}

    assert (base(PROMPT, callback_on_step_end=flat).video.frames == 0.25).all()
    blind = lambda of, step, t, kwargs: pytest.fail("shown") if "latents" in kwargs else {}  # noqa: E731
    assert base(PROMPT, callback_on_step_end=blind, callback_on_step_end_tensor_inputs=[]).frames.shape[0] == 1
    with pytest.raises(ValueError, match=r"base: the callback's latents are \[1\]"):
        base(PROMPT, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


# forms ---------------------------------------------------------------------------------------------------------------


def test_frames_come_as_those_of_diffusers(base: Any) -> None:
    out = base([PROMPT, OTHER], output_type="pt")
    assert out[0] is out.frames and out.frames.shape == (2, 4, 3, 8, 8) and out.frames.min() >= 0
    (array,) = base([PROMPT, OTHER], return_dict=False)
    assert array.shape == (2, 4, 8, 8, 3) and np.array_equal(array, out.frames.movedim(2, -1).numpy())
    pictures = base([PROMPT, OTHER], output_type="pil").frames
    assert [len(clip) for clip in pictures] == [4, 4]
    assert np.array_equal(np.stack([np.asarray(one) for one in pictures[1]]), media.to_bytes(out.video.frames[1]))


def test_forms_are_undone_by_their_inverse() -> None:
    clips = torch.rand(2, 3, 4, 6, 5, generator=generator("forms")) * 2 - 1
    for output_type in ("np", "pt"):
        frames: Any = to_frames(clips, output_type)
        assert torch.allclose(of_clips(frames), clips, atol=1e-6)
        assert torch.allclose(of_clips([*frames]), clips, atol=1e-6)
        assert torch.allclose(of_clips(frames[1])[0], clips[1], atol=1e-6)
    exact = media.to_float(torch.from_numpy(media.to_bytes(clips[0])))
    assert torch.equal(of_clips(to_frames(clips, "pil"))[0], exact)
    assert torch.equal(of_images([*to_frames(clips, "pil")[0]], "image"), exact.transpose(0, 1))  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"output_type": "gif"}, "output_type is 'gif', expected np, pt, pil"),
    ({"prompt": 3}, "prompt is 3"),
    ({"prompt": []}, r"prompt is \[\]"),
    ({"prompt": "  "}, "empty"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt is a list"),
    ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
    ({"num_inference_steps": {"bass": 3}}, "num_inference_steps names 'bass', expected base, tsr"),
    ({"num_inference_steps": 0}, "num_inference_steps of base is 0"),
    ({"num_inference_steps": 2.5}, "num_inference_steps of base is 2.5"),
    ({"guidance_scale": 7.5}, "no stage is guided"),
    ({"guidance_scale": "high"}, "guidance_scale is high"),
    ({"guidance_scale": {"base": -0.5}}, "guidance_scale of base is -0.5, expected a number of at least 0"),
    ({"guidance_scale": {"base": float("inf")}}, "guidance_scale of base is inf"),
    ({"guidance_scale": {"base": float("nan")}}, "guidance_scale of base is nan"),
    ({"generator": 7}, "generator is a int"),
    ({"generator": [7]}, "generator is a list, expected a torch.Generator or a list of them"),
    ({"generator": [torch.Generator()] * 2}, "generator holds 2 for 1 videos"),
    ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
    ({"image": torch.zeros(4, 8, 8)}, r"image is of size \(4, 8, 8\)"),
    ({"image": np.zeros((8, 8))}, r"image is of size \(8, 8\)"),
    ({"image": np.full((8, 8, 3), 2.0)}, "values outside"),
    ({"image": 3}, "image is a int"),
    ({"image": "none.png"}, "none.png"),
    ({"image": np.zeros((8, 8, 3)), "video": np.zeros((4, 8, 8, 3))}, "video too"),
    ({"image": []}, "image holds 0 for 1 prompts"),
    ({"last_image": [np.zeros((8, 8, 3))] * 2}, "last_image holds 2 for 1 prompts, expected one, or as many"),
    ({"last_image": "none.png"}, "last_image none.png: no such file"),
    ({"video": "none.mp4"}, "video none.mp4: no such file"),
    ({"mask": np.zeros((8, 8))}, "mask is given, but no video"),
    ({"mask": np.ones((8, 8)), "video": np.zeros((4, 8, 8, 3)), "last_image": "x"}, "mask is given, but last_image"),
    ({"mask": np.zeros((8, 8)), "video": np.zeros((4, 8, 8, 3))}, "mask: nothing of it is white"),
    ({"mask": [np.ones((8, 8))] * 3, "video": np.zeros((4, 8, 8, 3))}, "mask: 3 frames at 2 a second, .* has 4"),
    ({"mask": "none.png", "video": np.zeros((4, 8, 8, 3))}, "mask none.png: no such file"),
    ({"num_frames": 30}, "num_frames is 30, expected 31, made of 8 of base"),
    ({"num_frames": 2.5}, "num_frames is 2.5"),
    ({"num_frames": 31}, r"8 frames, expected the 4 that it makes at once\. Fix: base\.windows\.frames=4"),
    ({"num_frames": 7}, "2 frames at 2 a second, expected the 4 it makes at once"),
    ({"num_frames": 15, "video": np.ones((4, 8, 8, 3)), "mask": np.ones((8, 8))}, "mask is given, but num_frames too"),
    (
        {"video": np.zeros((4, 6, 8, 3))},
        r"6 frames, expected the 4 that it makes at once\. Fix: base\.windows\.frames=4",
    ),
    ({"video": Video.unknown(1, 3, Shape(frames=4, height=6, width=8), 2.0)}, "known frames come as 4x6x8"),
    ({"video": Video.unknown(1, 3, Shape(frames=4, height=8, width=8), 2.0), "image": "x"}, "video says what is known"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[str(changes)[:40] for changes, _ in BAD])
def test_a_wrong_argument_is_named_before_anything_loads(pipe: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, CascadeError), match=words):
        pipe(**({"prompt": PROMPT} | changes))
    assert not pipe.parts._stages and "source" not in vars(pipe.parts)


def test_a_stage_without_its_video_says_what_it_takes(pipe: Any) -> None:
    ssr = pipe.stages["ssr"]
    with pytest.raises(ConfigError, match=r"ssr needs a video to enlarge\. Fix: video=8x8x8"):
        ssr(PROMPT)
    with pytest.raises(ConfigError, match=r"the input is 6x8 pixels, expected 8x8\. Fix: video=8x8x8"):
        ssr(PROMPT, video=np.zeros((8, 6, 8, 3)))
    with pytest.raises(ValueError, match="image is given, but ssr takes a video"):
        ssr(PROMPT, image=np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="num_frames is given, but ssr takes a video"):
        ssr(PROMPT, num_frames=9)
    with pytest.raises(ValueError, match="video holds 3 for 2 prompts"):
        ssr([PROMPT, OTHER], video=np.zeros((3, 8, 8, 8, 3)))
    with pytest.raises(ValueError, match="several sizes"):
        ssr(PROMPT, video=[np.zeros((8, 8, 8, 3)), np.zeros((6, 8, 8, 3))])
    with pytest.raises(ConfigError, match="start is 'nowhere'"):
        pipe.since("nowhere")


def test_what_cannot_be_loaded_is_refused_at_once(mini: Path, tmp_path: Path, pipe: Any) -> None:
    for name, settings, words in (
        ("none", [], "neither a chain of conf/chain nor a folder"),
        (str(tmp_path), ["seed=3"], "settings are for a chain"),
        (str(tmp_path), [], "manifest.json is missing"),
        ("mini", ["base.sampler.stepz=3"], "steps"),
        ("mini", ["base.weights=none"], "none"),
        ("mini", ["base.weights=null"], "base has no weights"),
    ):
        with pytest.raises(CascadeError, match=words):
            Cascade.from_pretrained(name, *settings, config_dir=mini)
    with pytest.raises(HostError, match="toaster"):
        pipe.to("toaster")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        pipe.to(torch.int8)


# loading -------------------------------------------------------------------------------------------------------------


def test_weights_are_read_once_and_shared(mini: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = loading.load_stage

    def spy(cfg: Any, *rest: Any) -> Any:
        read.append(cfg.name)
        return load(cfg, *rest)

    monkeypatch.setattr(pipe.parts, "load", spy)
    pipe.stages["base"](PROMPT)
    assert read == ["base"]
    pipe(PROMPT)
    pipe(OTHER, num_inference_steps=1)
    pipe.since("ssr")(PROMPT, video=Video(torch.zeros(1, 3, 8, 8, 8), 4.0))
    assert read == list(STAGES)


def test_offloaded_stages_are_on_the_device_one_at_a_time(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, str]] = []
    monkeypatch.setattr(Stage, "to", lambda self, device: (moved.append((self.cfg.name, device.type)), self)[1])
    pipe.enable_model_cpu_offload()
    for cfg, rule in zip(pipe.chain.stages[:2], pipe.chain.rules, strict=False):
        pipe.parts.stage(cfg, rule, torch.device("cpu"))
    moved.clear()
    pipe.parts.stage(pipe.chain.stages[0], pipe.chain.rules[0], torch.device("meta"))
    assert moved == [("tsr", "cpu"), ("base", "meta")]


@pytest.mark.parametrize(
    ("asked", "gpu", "place"),
    [
        ({}, False, None),
        ({}, True, "cuda"),
        ({"gpu_id": 1}, True, "cuda:1"),
        ({"device": "cuda", "gpu_id": 1}, True, "cuda:1"),
        ({"device": torch.device("cuda:2")}, True, "cuda:2"),
        ({"device": "cpu"}, True, "cpu"),
        ({"device": "cuda:2", "gpu_id": 1}, True, "ValueError"),
        ({"device": "cpu", "gpu_id": 1}, True, "ValueError"),
    ],
)
def test_what_is_offloaded_works_where_diffusers_would(
    mini: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], gpu: bool, place: str | None
) -> None:
    pipe: Any = Cascade.from_pretrained("mini", config_dir=mini)
    moved: list[str | None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(pipe, "to", lambda device: moved.append(str(device)))
    if place == "ValueError":
        with pytest.raises(ValueError, match="gpu_id is 1 and device"):
            pipe.enable_model_cpu_offload(**asked)
    else:
        pipe.enable_model_cpu_offload(**asked)
        assert (moved or [None]) == [place] and pipe.parts.offload


def test_cascade_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, cascade; assert 'torch' not in sys.modules; from cascade import Cascade;"
        "assert 'torch' in sys.modules and not {'transformers', 'diffusers', 'hydra'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(package_root())})
    import cascade

    assert cascade.Cascade is api.Cascade
    with pytest.raises(AttributeError, match="no attribute 'Cascades'"):
        cascade.Cascades  # noqa: B018


def test_the_example_of_the_readme_runs_on_the_shipped_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (package_root() / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert '"tiny"' in example
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace('"tiny"', '"tiny", "stages=[base]"'), names)
    assert names["out"].frames.shape == (1, 8, 32, 32, 3)
    monkeypatch.chdir(tmp_path)
    cli.command(["generate", f"prompt={names['prompt']}", "seed=0", "stages=[base]", "out=run"])
    saved = clipfiles.read_clip(Path("run/stages/base/video.safetensors").read_bytes(), "run").frames
    assert torch.equal(names["out"].video.frames, saved)
