"""Peak memory of stages, as `cascade plan` predicts it and as it is when they sample.

    python benchmarks/memory.py [--device cuda] [--dtype bfloat16] [--quick] [--json FILE]

Every case runs in a process of its own. On CUDA it is the allocator's peak. On the CPU it is the resident set (VmHWM
of /proc/self/status) over that of the same process before, after a warm-up with a clip of 16 x 16 pixels. glibc keeps
freed blocks of up to 32 MB for reuse, in pieces, so it is measured twice: with every block of 64 KB or more given back
when it is freed, which is what the stage holds and what `memory=` makes of a run; and as glibc has it by default.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": str(64 << 10)}
TINY = [(name, []) for name in ("base", "tsr", "ssr1", "interp", "ssr2")]
LARGE: list[tuple[str, list[str]]] = [
    ("base", ["base.shape={frames: 16, height: 64, width: 64}"]),
    ("tsr", ["tsr.shape={frames: 32, height: 64, width: 64}", "tsr.windows.frames=32", "tsr.train=null"]),
    ("ssr1", ["ssr1.shape={frames: 32, height: 128, width: 128}", "ssr1.sampler={rule: dpmpp_2m, steps: 4}"]),
    ("ssr2", ["ssr2.shape={frames: 64, height: 256, width: 256}", "ssr2.windows.frames=64"]),
]
LONG = [
    ("ssr2", [f"ssr2.shape.frames={n}", "ssr2.windows.frames=128", "ssr2.frames_at_once=22"]) for n in (32, 64, 128)
]


@dataclass
class Case:
    """One stage of the chain tiny with these settings changed."""

    stage: str
    settings: list[str]
    device: str = "cpu"
    dtype: str = "float32"

    def read(self) -> tuple[Any, Any]:
        """Its config and rule."""
        from cascade.chain import Chain
        from cascade.compose import compose

        tree = compose("plan", ["chain=tiny", f"stages=[{self.stage}]", *self.settings])
        chain = Chain.read({key: tree[key] for key in ("stages", "text", self.stage)})
        return chain.stages[0], chain.rules[0]

    @property
    def title(self) -> str:
        return " ".join([self.stage, *self.settings]).replace(f"{self.stage}.", "")


def predicted(case: Case) -> int:
    """Bytes, of the denoiser as untrained weights make it."""
    from cascade.planning.count import Host, held

    cfg, rule = case.read()
    return held(replace(cfg, weights="random"), rule, 48, Host(case.device, case.dtype)).peak


def measured(case: Case) -> int:
    """Bytes over what this process holds after a warm-up."""
    import torch

    from cascade.windows import Windows

    cfg, rule = case.read()
    factor = 3 if rule.rate(cfg) == 2 else 2
    tiny = replace(cfg.shape, frames=factor - factor % rule.rate(cfg) + cfg.shape.frames % 2, height=16, width=16)
    sample(replace(cfg, shape=tiny, train=None, windows=Windows()), rule, case)
    if case.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sample(cfg, rule, case)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    sample(cfg, rule, case)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def sample(cfg: Any, rule: Any, case: Case) -> None:
    """One clip from noise, by random weights."""
    import torch

    from cascade.chain import Device
    from cascade.errors import ConfigError
    from cascade.loading import untrained
    from cascade.noise import Noise, sample_id
    from cascade.pipeline import precision
    from cascade.text import Text
    from cascade.video import Video

    on = Device(device=case.device, dtype=case.dtype)
    stage, _ = untrained(cfg, rule, on.torch, on.computes(cfg))
    text = Text(torch.randn(1, 48, cfg.net.text), torch.ones(1, 48, dtype=torch.bool))
    try:
        rule.output(None, cfg)
        low = None
    except ConfigError:
        takes = rule.takes(cfg)
        low = Video(torch.rand(1, 3, takes.frames, takes.height, takes.width), cfg.fps / rule.rate(cfg))
    with torch.no_grad(), precision(on, cfg):
        stage.sample(low, text, None, Noise(0, cfg.name, (sample_id("a"),)))


def in_child(case: Case, **env: str) -> int:
    """`measured` in a process of its own."""
    word = json.dumps([case.stage, case.settings, case.device, case.dtype])
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, __file__, "--case", word],
        env={**os.environ, "PYTHONPATH": path, **env}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return int(child.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="the chain tiny alone")
    parser.add_argument("--only", help="one stage of the chain tiny")
    parser.add_argument("--json", help="a file for the numbers; -: nothing but the numbers, on stdout")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        print(measured(Case(*json.loads(asked.case))))
        return
    sys.path.insert(0, str(ROOT))
    rows: list[dict[str, Any]] = []
    show = print if asked.json != "-" else lambda line: None
    show("| stage | predicted, MB | measured, MB | predicted / measured | as glibc has it, MB |\n|---|---|---|---|---|")
    cases = TINY if asked.quick else TINY + LARGE + LONG
    for stage, settings in [(asked.only, [])] if asked.only else cases:
        case = Case(stage, settings, asked.device, asked.dtype)
        row: dict[str, Any] = {"case": case.title, "predicted": predicted(case)}
        if asked.device == "cuda":
            row |= {"measured": in_child(case), "default": None}
        else:
            row |= {"measured": in_child(case, **GIVEN_BACK), "default": None if asked.only else in_child(case)}
        rows.append(row)
        ratio = row["predicted"] / row["measured"]
        sizes = ["" if row[key] is None else f"{row[key] / 1e6:.1f}" for key in ("predicted", "measured", "default")]
        show(f"| {row['case']} | {sizes[0]} | {sizes[1]} | {ratio:.2f} | {sizes[2]} |")
        sys.stdout.flush()
    if asked.json == "-":
        print(json.dumps(rows))
    elif asked.json is not None:
        Path(asked.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
