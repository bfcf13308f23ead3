"""Laws of `memory=`: what is chosen fits and is the best that does, what was typed stays, the least named does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade.chain import Chain, Device
from cascade.cli import command, run_main
from cascade.config import plugin
from cascade.errors import ConfigError, MemoryLimitError
from cascade.loading import untrained
from cascade.nets.compiled import Compile
from cascade.nets.unet_config import LevelSpec, Mixer
from cascade.noise import Noise, sample_id
from cascade.pipeline import precision
from cascade.planning.count import Host, held
from cascade.planning.memory import Memory, fitting, largest, short, size, within
from cascade.sampling.sampler import Sampler
from cascade.settings import StageConfig, TrainConfig
from cascade.text import TextConfig
from cascade.video import Shape, Video
from cascade.windows import Windows

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 5
CPU, CUDA = Device(device="cpu"), Device(device="cuda")
Make = Callable[..., Any]


@pytest.fixture
def wide(stage_config: Make, net_config: Make) -> Callable[..., StageConfig]:
    """A stage whose activations, of 24 frames, are most of what it holds."""

    def make(kind: str = "ssr", mixer: Mixer = Mixer.CONV, **changes: Any) -> StageConfig:
        net = net_config(levels=[LevelSpec(channels=48, mixer=mixer)], frame_position=kind == "base")
        train = TrainConfig(steps=1, batch=1, lr=0.1, crop=Shape(frames=8, height=8, width=8))
        cfg: StageConfig = stage_config(
            kind, **({"net": net, "shape": Shape(frames=24, height=16, width=16), "train": train} | changes)
        )
        return cfg

    return make


def need(cfg: StageConfig, on: Device = CPU) -> int:
    rule: Any = plugin(cfg.kind)
    return held(cfg, rule, TOKENS, Host.of(on)).peak


def fitted(cfg: StageConfig, limit: int, on: Device = CPU, typed: str = "") -> tuple[StageConfig, str]:
    rule: Any = plugin(cfg.kind)
    chain = Chain([cfg], [rule], TextConfig(encoder="/nowhere", max_tokens=TOKENS))
    found = fitting(chain, on, Memory(memory=f"{limit}B", command=f"cascade generate {typed}"))
    return found.chain.stages[0], found.said[0]


# what is asked --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GB", 12 * 10**9), ("800 MB", 800 * 10**6), ("1.5gib", 3 * 2**29), ("7B", 7), ("2TB", 2 * 10**12)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert size(text) == expected == Memory(memory=text).limit


@pytest.mark.parametrize("text", ["12", "GB", "0GB", "-1GB", "1e9B", "12 GBs", "12 G B", "", "9" * 400 + "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 12GB"):
        Memory(memory=text)


# what is chosen -------------------------------------------------------------------------------------------------------


def test_what_fits_stays_as_it_is(wide: Make) -> None:
    cfg = wide()
    bytes_ = need(cfg)
    assert fitted(cfg, bytes_) == (cfg, f"memory={bytes_}B: ssr holds {short(bytes_)} as it is set")
    rule: Any = plugin("ssr")
    chain = Chain([cfg], [rule], TextConfig())
    assert within(chain, CPU, Memory()) is chain


def test_exact_parts_come_first_and_are_as_large_as_fit(wide: Make) -> None:
    cfg = wide()
    parts = replace(cfg, frames_at_once=15)
    limit = need(parts)
    chosen, line = fitted(cfg, limit + 100)
    assert chosen == parts and need(replace(cfg, frames_at_once=16)) > limit + 100
    assert "frames_at_once=15: the same result but for its last bits, 1.3 times the work" in line


def test_windows_come_last_and_are_no_shorter_than_what_was_trained(wide: Make) -> None:
    cfg = wide(mixer=Mixer.ATTN)
    chosen, line = fitted(cfg, (need(cfg) * 2) // 3)
    assert chosen == replace(cfg, windows=chosen.windows) and 8 <= chosen.windows.frames < 24
    assert need(chosen) <= (need(cfg) * 2) // 3 and "so the result changes" in line
    with pytest.raises(MemoryLimitError) as caught:
        fitted(cfg, need(cfg) // 8)
    least = int(re.search(r"memory=(\d+)MB", caught.value.fix)[1]) * 10**6  # type: ignore[index]
    assert need(replace(cfg, windows=Windows(frames=8, overlap=2))) <= least


@pytest.mark.parametrize(("kind", "frames"), [("tsr", 24), ("interp", 25)])
def test_windows_are_legal_for_stages_that_add_frames(kind: str, frames: int, wide: Make) -> None:
    train = TrainConfig(steps=1, batch=1, lr=0.1, crop=Shape(frames=8 + frames % 2, height=8, width=8))
    cfg = wide(kind, Mixer.ATTN, shape=Shape(frames=frames, height=16, width=16), train=train)
    chosen, _ = fitted(cfg, (need(cfg) * 2) // 3)
    rule: Any = plugin(kind)
    assert chosen.windows.frames % 2 == frames % 2
    Chain([chosen], [rule], TextConfig(encoder="/nowhere")).check()


def test_a_network_that_knows_the_place_of_a_frame_is_never_cut(wide: Make) -> None:
    cfg = wide("base")
    with pytest.raises(MemoryLimitError, match="base holds"):
        fitted(cfg, need(cfg) - 1)


@pytest.mark.parametrize("share", [0.8, 0.45])
@pytest.mark.parametrize("on", [CPU, CUDA])
def test_whatever_is_chosen_fits(share: float, on: Device, wide: Make, net_config: Make) -> None:
    cfg = wide(net=net_config(levels=[LevelSpec(channels=128)]))
    free = 32 << 20 if on is CUDA else 0  # what cuBLAS takes in any case
    limit = free + int(share * (need(cfg, on) - free))
    try:
        chosen, _ = fitted(cfg, limit, on)
    except MemoryLimitError as error:
        least = int(re.search(r"memory=(\d+)MB", error.fix)[1]) * 10**6  # type: ignore[index]
        assert least > limit
        chosen, limit = fitted(cfg, least, on)[0], least
    assert need(chosen, on) <= limit


def test_weights_move_before_digits_are_lost(wide: Make, net_config: Make) -> None:
    """Of a stage that is mostly weights; on the CPU there is nowhere to move them to, and half precision is slow."""
    cfg = wide("base", net=net_config(levels=[LevelSpec(channels=128, blocks=3)], frame_position=True))
    cfg = replace(cfg, shape=Shape(frames=2, height=8, width=8), train=None)
    limit = (32 << 20) + (need(cfg) * 6) // 10
    assert fitted(cfg, limit, CUDA)[0] == replace(cfg, offload=True)
    assert fitted(cfg, limit, CUDA, "base.offload=false")[0] == replace(cfg, dtype="bfloat16")
    for on, typed in ((CUDA, "base.offload=false dtype=float32"), (CPU, "")):
        with pytest.raises(MemoryLimitError):
            fitted(cfg, limit if on is CUDA else (need(cfg) * 6) // 10, on, typed)


# what was typed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["ssr.frames_at_once=0", "'++ssr.frames_at_once=0'", "frames_at_once=0"])
def test_what_was_typed_is_not_changed(typed: str, wide: Make) -> None:
    cfg = wide()
    limit = need(replace(cfg, frames_at_once=15))
    chosen, _ = fitted(cfg, limit, typed=f"{typed} prompt='a \"b'")
    assert chosen.frames_at_once == 0 and chosen.windows != cfg.windows
    with pytest.raises(MemoryLimitError, match="or leave frames_at_once and windows to be chosen"):
        fitted(cfg, limit, typed=f"{typed} ssr.windows.frames=0")


def test_another_stage_may_be_typed(wide: Make) -> None:
    cfg = wide()
    parts = replace(cfg, frames_at_once=15)
    assert fitted(cfg, need(parts), typed="ssr2.frames_at_once=0 ssrs=1")[0] == parts


def test_the_precision_that_was_typed_stays(wide: Make) -> None:
    cfg = wide("base", train=None)
    limit = (32 << 20) + int(need(cfg) * 0.75)
    assert fitted(cfg, limit, CUDA)[0].dtype == "bfloat16"
    with pytest.raises(MemoryLimitError, match="or leave dtype to be chosen"):
        fitted(cfg, limit, CUDA, "dtype=float32")


# the whole ------------------------------------------------------------------------------------------------------------


def test_a_long_input_needs_more_than_the_settings_say(wide: Make) -> None:
    """Its windows are as long, what is kept of the whole video is not."""
    rule: Any = plugin("ssr")
    cfg = wide(windows=Windows(frames=24, overlap=4))
    chain = Chain([cfg], [rule], TextConfig(encoder="/nowhere", max_tokens=TOKENS))
    ask = Memory(memory=f"{int(need(cfg) * 1.03)}B")
    assert fitting(chain, CPU, ask).chain.stages[0] == cfg
    assert fitting(chain, CPU, ask, Shape(frames=80, height=8, width=8)).chain.stages[0] != cfg


def test_a_chain_names_the_stage_that_needs_most(wide: Make) -> None:
    rules: Any = [plugin("base"), plugin("ssr")]
    base = wide("base", shape=Shape(frames=24, height=8, width=8), train=None)
    chain = Chain([base, wide()], rules, TextConfig(encoder="tiny/text", max_tokens=TOKENS))
    with pytest.raises(MemoryLimitError, match=r"1MB, but ssr holds .* beside 2.23 MB for the text") as caught:
        fitting(chain, CPU, Memory(memory="1MB"))
    least = re.search(r"memory=\d+MB", caught.value.fix)[0]  # type: ignore[index]
    said = fitting(chain, CPU, Memory(memory=least.partition("=")[2])).said
    assert [line.split()[1] for line in said] == ["base", "ssr", "2.23"]


def test_plan_says_what_it_chose_and_refuses_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stage = "stages=[base]"
    command(["plan", stage, "memory=1GB", "format=json"])
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["stages", "others", "memory"] and "as it is set" in shown["memory"][0]
    command(["plan", stage, "memory=1GB"])
    assert "memory=1GB: base holds 19.6 MB as it is set" in capsys.readouterr().out
    out = tmp_path / "out"
    for words in (["plan", stage], ["generate", stage, "prompt=a red circle", f"out={out}"]):
        with pytest.raises(SystemExit) as exit:
            run_main([*words, "memory=5MB"], command, "cascade")
        error = capsys.readouterr().err
        assert exit.value.code == 7 and error.count("\n") == 1
        assert error.startswith("error: memory is 5MB, but base holds 19.")
    assert not out.exists()
    with pytest.raises(ConfigError, match="expected a size such as 12GB"):
        command(["plan", stage, "memory=plenty"])


def test_the_largest_is_found_by_halving() -> None:
    for best in range(3, 20):
        asked: list[int] = []
        assert largest(3, 20, lambda n, best=best, asked=asked: asked.append(n) or n <= best) == best  # type: ignore[misc]
        assert len(asked) <= 5


# offload --------------------------------------------------------------------------------------------------------------


def test_weights_that_visit_change_nothing_and_are_not_held(make_stage: Make, encode: Make, net_config: Make) -> None:
    net = net_config(levels=[LevelSpec(channels=64, blocks=2, mixer=Mixer.BOTH, text_attention=True)])
    stay, visit = (make_stage("ssr", std=0.2, net=net, offload=offload) for offload in (False, True))
    cpu, videos = torch.device("cpu"), []
    for stage in (stay.to(cpu), visit.to(cpu).to(cpu)):
        low = Video(torch.linspace(-1, 1, 4 * 3 * 16).view(1, 3, 4, 4, 4), 8.0)
        with torch.no_grad():
            video = stage.sample(low, encode(["a red circle"]), None, Noise(0, "ssr", (sample_id("a"),)))
        videos.append(video.frames)
    assert torch.equal(*videos)
    weights = [sum(p.nbytes for p in part.parameters()) for part in (visit.net, *visit.net.up[0])]
    assert need(stay.cfg) - need(visit.cfg) == weights[0] - max(weights[1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("offload", [False, True])
def test_weights_in_half_precision_are_held_once(
    dtype: str, offload: bool, make_stage: Make, encode: Make, net_config: Make
) -> None:
    """Equal bit for bit to casting them at every call, and half of them is what the plan counts."""
    net = net_config(levels=[LevelSpec(channels=64, blocks=2, mixer=Mixer.BOTH, text_attention=True)])
    cfg, rule, cpu = make_stage("ssr", net=net).cfg, plugin("ssr"), torch.device("cpu")
    on, videos = Device(device="cpu", dtype=dtype), []
    for kept in (torch.float32, on.computes(cfg)):
        stage, _ = untrained(replace(cfg, offload=offload), rule, cpu, kept)  # type: ignore[arg-type]
        low = Video(torch.linspace(-1, 1, 4 * 3 * 16).view(1, 3, 4, 4, 4), 8.0)
        with torch.no_grad(), precision(on, cfg):
            videos.append(stage.sample(low, encode(["a red circle"]), None, Noise(0, "ssr", (sample_id("a"),))).frames)
    assert torch.equal(*videos)
    params = sum(parameter.numel() for parameter in stage.net.parameters())
    assert need(cfg) - need(replace(cfg, dtype=dtype)) > 1.9 * params


def test_weights_stay_where_a_gradient_passes_or_a_graph_reads_them(wide: Make, net_config: Make) -> None:
    """They would be found on the host, or nowhere: such pairs are refused, and never chosen."""
    for changes, why, fix in (
        (
            {"sampler": Sampler(steps=2, reconstruction=2.0)},
            r"gradient of sampler\.reconstruction, 2",
            "sampler.reconstruction=0",
        ),
        ({"compile": Compile.GRAPH}, "CUDA graph", "compile=none"),
    ):
        with pytest.raises(ConfigError, match=f"offload is true, but .*{why}") as caught:
            wide("base", offload=True, **changes)
        assert caught.value.fix == f"base.offload=false, or base.{fix}"
    cfg = wide("base", net=net_config(levels=[LevelSpec(channels=128, blocks=3)], frame_position=True))
    cfg = replace(cfg, shape=Shape(frames=2, height=8, width=8), train=None, dtype="bfloat16")
    limit = (32 << 20) + (need(cfg, CUDA) - (32 << 20)) * 6 // 10
    assert fitted(cfg, limit, CUDA)[0].offload
    with pytest.raises(MemoryLimitError, match="base holds"):
        fitted(replace(cfg, sampler=replace(cfg.sampler, reconstruction=2.0)), limit, CUDA)
    with pytest.raises(MemoryLimitError, match="base holds"):
        fitted(replace(cfg, compile=Compile.GRAPH), limit, CUDA)


def test_the_shipped_base_plans_for_a_gpu_or_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It is drawn towards what is given."""
    words = ["plan", "chain=tiny", "stages=[base]", "device=cuda"]
    command([*words, "memory=1GB"])
    assert "as it is set" in capsys.readouterr().out
    for more, code, said in (
        (["memory=36MB"], 7, "error: memory is 36MB, but base holds "),
        (["base.offload=true"], 2, "error: base: offload is true, but the gradient of"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_main([*words, *more], command, "cascade")
        error = capsys.readouterr().err
        assert exit.value.code == code and error.count("\n") == 1 and error.startswith(said), error


# the process ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not say what is held")
def test_a_stage_holds_what_was_predicted() -> None:
    """The benchmark's smallest case: predicted within a fifth of what is measured."""
    script = ROOT / "benchmarks" / "memory.py"
    done = subprocess.run([sys.executable, script, "--only", "base", "--json", "-"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert 0.8 < row["predicted"] / row["measured"] < 1.2
