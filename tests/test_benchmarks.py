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

ROOT = Path(__file__).resolve().parents[1]
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
