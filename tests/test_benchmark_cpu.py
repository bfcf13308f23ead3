"""The CPU's benchmark measures what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = Path(__file__).resolve().parents[1] / "benchmarks" / "cpu_child.py"


def measured(*words: str) -> Any:
    done = subprocess.run([sys.executable, str(CHILD), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_super_resolution_stage_needs_less_memory_in_windows() -> None:
    whole, windows = (measured("scaling", "ssr2", "96", "64", window) for window in ("0", "16"))
    assert whole["seconds"] > 0 and 0 < windows["bytes"] < 0.6 * whole["bytes"]
