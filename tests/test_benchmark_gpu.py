"""The paper-size benchmark predicts by the plan, adds up what it measured, and runs in miniature on torch alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade.chain import Chain, chain_settings
from cascade.config import parse, plain
from cascade.planning import count

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_cascade  # noqa: E402
import peer_models  # noqa: E402
from gpu_cascade import Rates, Roofline  # noqa: E402

ASKED = gpu.settings()
RATES = parse(ASKED["rates"], Rates)
# Each kind at a speed of its own; launches for nothing.
PLAIN = Rates(
    device="none", ceiling=8e3, bandwidth=1e3, convolution=0.5, product=0.25, attention=0.125, norm=0.1, rest=0.2,
    columns=64, launch=0.0,
)  # fmt: skip
ABSENT = ("hydra", "omegaconf", "yaml", "xformers", "diffusers", "imagen_pytorch", "av", "accelerate", "matplotlib")
ALONE = f"""
import os.path, runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def small() -> gpu.Prepared:
    return gpu.prepare(dry=True)


# predictions ---------------------------------------------------------------------------------------------------------


def test_a_kernel_takes_the_longer_of_its_products_and_its_bytes() -> None:
    a, b = torch.empty(6, 10, device="meta"), torch.empty(10, 64, device="meta")
    with Roofline(PLAIN) as roof:
        a @ b
    flops, moved = 2 * 6 * 10 * 64, 4 * (60 + 640 + 384)
    assert roof.flops == flops and roof.launches == 1
    assert roof.seconds == pytest.approx(max(flops / (0.25 * 8e3), moved / (0.2 * 1e3)))
    with Roofline(replace(PLAIN, bandwidth=1e9)) as roof:
        a @ b
    assert roof.seconds == pytest.approx(flops / (0.25 * 8e3))


def test_a_tile_of_channels_costs_what_a_full_one_does() -> None:
    seconds = []
    for channels in (80, 128):
        x, weight = torch.empty(2, 4, 5, 5, device="meta"), torch.empty(channels, 4, 3, 3, device="meta")
        with Roofline(replace(PLAIN, bandwidth=1e9)) as roof:
            torch.nn.functional.conv2d(x, weight, padding=1)
        assert roof.flops == 2 * (2 * 25) * channels * 4 * 9
        seconds.append(roof.seconds)
    assert seconds[0] == pytest.approx(seconds[1])


def test_views_cost_nothing_and_expanded_tensors_what_is_stored() -> None:
    x = torch.empty(3, 1, device="meta")
    with Roofline(PLAIN) as roof:
        wide = x.expand(3, 100)[:, :50].t()
    assert roof.launches == 0 and roof.seconds == 0
    with Roofline(PLAIN) as roof:
        wide.clone()
    assert roof.seconds == pytest.approx(4 * (3 + 150) / (0.2 * 1e3))


def test_launches_bound_what_is_small() -> None:
    x = torch.empty(1, device="meta")
    with Roofline(replace(PLAIN, launch=10.0)) as roof:
        x + x
        x * x
    assert roof.seconds == 20 and roof.why().startswith("2 launches")


def test_norms_are_known_before_the_run(small: gpu.Prepared) -> None:
    assert {norm[0] for norm in small.norms} >= {16, 32} and {norm[4:] for norm in small.norms} >= {(True, True)}
    gpu_cascade.compile_norms(small.norms[:2], torch.device("cpu"))


def test_predictions_stand_for_the_plan_and_the_code_as_they_are() -> None:
    """In all of base and ssr3; the other stages' FLOPs alone."""
    chain = Chain.read(chain_settings(ASKED["chain"]))
    table, tokens = ASKED["predicted"], chain.text.max_tokens
    assert list(table) == [cfg.name for cfg in chain.stages]
    for cfg, rule in zip(chain.stages, chain.rules, strict=True):
        flops = count.work(cfg, rule, tokens)[1]
        assert table[cfg.name]["tflop"] == pytest.approx(flops / 1e12, rel=1e-3)
        if cfg.name in ("base", "ssr3"):
            found = gpu_cascade.roofline(cfg, rule, tokens, RATES)
            assert found.flops == flops
            assert table[cfg.name]["ms"] == pytest.approx(1e3 * found.seconds, rel=0.01)
            assert table[cfg.name]["why"] == found.why()


# what it adds up -----------------------------------------------------------------------------------------------------


def test_the_clip_is_the_sum_of_its_stages_and_fewer_frames_count_by_their_work(small: gpu.Prepared) -> None:
    results = gpu.Results(small, None, {"device": "none", "torch": "0"})
    for i, stage in enumerate(small.stages):
        size = stage.sizes[-1]
        results.stages[stage.settings["name"]] = {
            "frames": size.frames, "flops": size.flops, "ceiling": 1e9,
            "ms": {"ours": [2.0 + i, 1, 9], "torch": [50.0, 1, 99]},
        }  # fmt: skip
    whole = gpu.clip(results)
    want = sum(
        1e-3 * s.evaluations * (2 + i) * s.sizes[0].flops / s.sizes[-1].flops for i, s in enumerate(small.stages)
    )
    assert whole["seconds"] == pytest.approx(want)
    assert whole["of_ceiling"] == pytest.approx(
        sum(s.evaluations * s.sizes[0].flops for s in small.stages) / (want * 1e9)
    )
    assert whole["fewer_frames"] == [s.settings["name"] for s in small.stages if len(s.sizes) > 1] != []
    results.stages["ssr3"] = {"skipped": "out of time"}
    assert gpu.clip(results)["missing"] == ["ssr3"] and gpu.clip(results)["seconds"] < want


def test_a_size_that_does_not_work_gives_way_to_a_smaller_one(
    small: gpu.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = next(s for s in small.stages if len(s.sizes) > 1)

    def fake(run: Any, prepared: Any, stage: Any, size: Any, launches: Any) -> dict[str, Any]:
        works = size is stage.sizes[1]
        return {
            "frames": size.frames,
            "ms": {"ours": [1.0] * 3} if works else {},
            "refused": {} if works else {"ours": "no"},
        }

    monkeypatch.setattr(gpu, "measured", fake)
    found = gpu.largest(gpu.Run(True, 100.0, 0.0, None, None), small, stage)
    assert found["frames"] == stage.sizes[1].frames == stage.sizes[0].frames // 2
    assert found["refused"] == {f"{stage.sizes[0].frames} frames": "no"}


def test_networks_are_built_on_a_device_that_is_not_the_cpu(
    small: gpu.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors, which as CUDA's refuse to meet those of the CPU."""
    device = torch.device("meta")
    monkeypatch.setattr(peer_models, "fill", lambda net: None)
    work = peer_models.Work(**small.work)
    with device:
        again = peer_models.Work(**small.work)
        assert torch.equal(again.clip(), work.clip()) and torch.equal(again.embedded, work.embedded)
        net, call = peer_models.build("cascade", small.networks["cascade"], work.on(device))
        peer_models.by_name(torch.nn.Linear(2, 2))
    with torch.no_grad():
        out = call(work.clip().to(device))
    assert out.device == device and out.shape == work.clip().shape
    assert {x.device for x in (*net.parameters(), *net.buffers())} == {device}


# the run -------------------------------------------------------------------------------------------------------------


def ran(tmp_path: Path, prepared: gpu.Prepared, *words: str) -> tuple[dict[str, Any], str]:
    file = tmp_path / "prepared.json"
    file.write_text(json.dumps(plain(prepared)))
    command = [sys.executable, "-c", ALONE, str(BENCHMARKS / "gpu.py"), "--dry", str(file), "--out", str(tmp_path)]
    done = subprocess.run([*command, *words], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()


def test_it_runs_in_miniature_without_hydra_and_peers(tmp_path: Path, small: gpu.Prepared) -> None:
    found, table = ran(tmp_path, small, "--parts", "stages,ways,sampling,peers")
    assert list(found["stages"]) == [stage.settings["name"] for stage in small.stages]
    for row, stage in zip(found["stages"].values(), small.stages, strict=True):
        assert set(row["ms"]) == {"ours", "torch", "float32 weights"}
        assert set(row["refused"]) == {"xformers", "graph"}
        assert row["sampled"]["finite"] and row["frames"] == stage.sizes[0].frames
    assert found["clip"]["evaluations"] == sum(stage.evaluations for stage in small.stages)
    assert found["clip"]["missing"] == [] and found["clip"]["seconds"] > 0
    assert found["peers"]["cascade"]["ms"]["eager"][0] > 0
    assert all("eager" in found["peers"][name]["refused"] for name in ("diffusers-unet3d", "imagen-pytorch"))
    assert "s a clip" in table and all(f"| {name} |" in table for name in found["stages"])


@pytest.mark.slow
def test_what_compiles_stands_beside_what_does_not(tmp_path: Path, small: gpu.Prepared) -> None:
    found, table = ran(tmp_path, replace(small, stages=small.stages[:1]), "--parts", "stages,compiled,regional")
    assert set(found["stages"]["base"]["beside_regional"]) == {"ours", "regional"}
    assert found["peers"]["cascade"]["ms"]["compiled"][0] > 0 and "| base |" in table


def test_time_that_is_up_is_said(tmp_path: Path, small: gpu.Prepared) -> None:
    found, table = ran(tmp_path, small, "--budget", "0", "--parts", "stages,peers")
    assert {row["skipped"] for row in found["stages"].values()} == {"out of time"}
    assert found["clip"]["missing"] == [stage.settings["name"] for stage in small.stages]
    assert "out of time" in table
