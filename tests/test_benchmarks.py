"""The benchmarks run in miniature, with nothing but what their machine has."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_norm  # noqa: E402
import gpu_temporal  # noqa: E402
from measure import Run  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu_kernels.py"
ABSENT = ("hydra", "omegaconf", "xformers", "diffusers", "av", "transformers", "accelerate", "imageio", "matplotlib")
ALONE = f"""
import os.path, runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(log: Path, *words: str, **environment: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", ALONE, str(SCRIPT), "--dry", "--log", str(log), *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shown, logged = [json.loads(line) for line in done.stdout.splitlines()], rows(log)
    assert all(row in logged for row in shown)
    assert not [row for row in logged if row.get("ok") is False or "refused" in row]
    return logged


def test_the_kernels_benchmark_runs_in_miniature(tmp_path: Path) -> None:
    found = run(tmp_path / "log")
    assert {"temporal", "norm", "check", "ceilings", "temporal ours", "unet", "large", "end"} <= {
        r["part"] for r in found
    }
    assert [r["with_failures"] for r in found if r["part"] == "check"] == [0]
    assert sum("errors" in r for r in found) > 20


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_benchmark_runs_through_triton_in_miniature(tmp_path: Path) -> None:
    found = run(tmp_path / "log", TRITON_INTERPRET="1")
    assert any(r["part"] == "launches" and "shape" in r for r in found)


def test_time_that_is_up_is_said(tmp_path: Path) -> None:
    found = run(tmp_path / "log", "--budget", "0", "--parts", "temporal,norm,unet")
    assert {r["part"] for r in found if "skipped" in r} == {"temporal", "norm", "unet"}


def broken(*_: Any) -> Any:
    raise RuntimeError("an illegal memory access\nand how")


def test_a_check_that_raises_is_one_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, log = Run(True, 60.0, 0.0, None, tmp_path / "log"), tmp_path / "log"
    monkeypatch.setattr(gpu_norm, "ours", broken)
    gpu_norm.check(done)
    found = rows(log)
    assert done.failed == len(found) > 2 and {r["raised"] for r in found} == {"an illegal memory access"}
    gpu_temporal.check_one(done, gpu_temporal.DRY[0], "fp32", "table")
    assert rows(log)[-1]["ok"]


def test_a_peer_that_does_not_compile_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, shape = Run(True, 1e12, 0.0, None, tmp_path / "log"), gpu_temporal.DRY[0]
    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    assert not gpu_temporal.warm(done, shape)
    gpu_temporal.time_peers(done, shape, 0.0, [gpu_temporal.FLEX, "view+sdpa"])
    found = [r for r in rows(tmp_path / "log") if r["part"] in ("flex", "temporal peer")]
    assert ["refused" in r for r in found] == [True] * 4 + [False]


def test_slices_of_positions_fit_a_grid() -> None:
    for clips, _, positions, heads, _ in gpu_temporal.TIMED:
        parts = gpu_temporal.slices((clips, 0, positions, heads, 0))
        assert positions % parts == 0 and clips * (positions // parts) * heads <= 65535
    assert gpu_temporal.slices((2, 16, 15360, 5, 64)) == 3
    assert gpu_temporal.slices((1, 64, 3840, 5, 64)) == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_in_slices_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(gpu_temporal, "slices", lambda shape: 3)
    shape = (2, 4, 6, 2, 16)
    _, q, k, v, table = (x.float() for x in gpu_temporal.projections(Run(True, 1.0, 0.0, None, None), shape))
    for bias in (None, table):
        want = gpu_temporal.attend(q, k, v, bias=bias, kernel="reference")
        torch.testing.assert_close(gpu_temporal.flex(shape)(q, k, v, bias), want)


class Donating(torch.autograd.Function):
    """x, whose backward pass cannot run twice: it gives its memory away, as compiled code does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.ran = False
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        if ctx.ran:
            raise RuntimeError("compiled with non-empty donated buffers")
        ctx.ran = True
        return grad


def test_flex_attentions_backward_runs_once_on_each_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, shape = Run(True, 1e12, 0.0, None, tmp_path / "log"), gpu_temporal.DRY[0]
    monkeypatch.setattr(gpu_temporal, "flex", lambda shape: lambda q, k, v, bias: Donating.apply(q + k + v))
    gpu_temporal.time_peers(done, shape, 0.0, [gpu_temporal.FLEX])
    found = [r for r in rows(tmp_path / "log") if r["part"] == "temporal peer"]
    assert [r["bias"] for r in found] == ["plain", "bias"]
    assert all(isinstance(times, list) for r in found for times in r["forward_backward"])
