"""Where the seconds of a clip go on the CPU: start-up, every stage and what is inside it, time and memory against size.

    python benchmarks/cpu.py [--rounds 3] [--parts start,generate,inside,waste,scaling] [--plot docs/scaling.png]

Prints Markdown tables. Every measurement is a process of its own on one thread; seconds are user + system time of the
CPU, medians over interleaved rounds, so that a busy machine shows in the clock ("wall") alone. Takes three to four
minutes on two idle cores; with --quick, one round and the smaller sizes, one and a half.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = ("start", "generate", "inside", "waste", "scaling")
PROMPT = "a large red circle moves left on a black background"
CLI = "from cascade.cli import main; main()"
CURVES = {"base": ("base", 0), "ssr2, whole": ("ssr2", 0), "ssr2, windows of 16 frames": ("ssr2", 16)}
FRAMES, SIDES = (16, 32, 64, 128), (32, 64, 128)


@dataclass(frozen=True)
class Spent:
    """What a process took: seconds of the CPU and of the clock, bytes at its peak; and what it printed."""

    cpu: float
    wall: float
    peak: int
    out: str = ""


def spend(command: Sequence[str]) -> Spent:
    """Runs a command on one thread to its end. RuntimeError with what it said if it fails."""
    one = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=said, env={**os.environ, **one})
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (said, printed):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: {said.read().decode()[-2000:]}")
        return Spent(usage.ru_utime + usage.ru_stime, wall, 1024 * usage.ru_maxrss, printed.read().decode())


def child(*words: str | int) -> Any:
    """What cpu_child.py says."""
    return json.loads(spend([sys.executable, str(HERE / "cpu_child.py"), *map(str, words)]).out)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print()
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


# start-up ------------------------------------------------------------------------------------------------------------


def start(rounds: int) -> None:
    """Commands from the outside, beside the import of transformers' T5 alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text(PROMPT)
        python = [sys.executable, "-c"]
        made = ["generate", f"prompt={PROMPT}"]
        spend([*python, CLI, "embed", f"prompts={folder}/prompts.txt", f"out={folder}/store"])
        found: dict[str, list[Spent]] = {}
        for number in range(rounds):
            out = f"out={folder}/{number}"
            for name, words in {
                "`cascade --help`": [CLI, "--help"],
                "`import torch`": ["import torch"],
                "`from transformers import T5EncoderModel`": ["from transformers import T5EncoderModel"],
                "`cascade generate`": [CLI, *made, out],
                "the same again: all is there": [CLI, *made, out],
                "with `text.store`": [CLI, *made, f"{out}s", f"text.store={folder}/store"],
            }.items():
                found.setdefault(name, []).append(spend([*python, *words]))
    rows = []
    for name, spent in found.items():
        cpu, wall = [s.cpu for s in spent], [s.wall for s in spent]
        peak = statistics.median(s.peak for s in spent) / 2**20
        rows.append([name, of(cpu), of(wall), f"{peak:.0f}"])
    table(("process", "CPU, s", "wall, s", "peak RSS, MiB"), rows)
    extra = [a.cpu - b.cpu for a, b in zip(*(list(found.values())[i] for i in (3, 2)), strict=True)]
    clock = [a.wall - b.wall for a, b in zip(*(list(found.values())[i] for i in (3, 2)), strict=True)]
    print(f"\n`cascade generate` over the import of T5: {of(extra)} s of the CPU, {of(clock)} s by the clock.")


def of(values: Sequence[float]) -> str:
    """Median and range."""
    middle = statistics.median(values)
    return f"{middle:.2f}" if len(values) == 1 else f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"


# one clip ------------------------------------------------------------------------------------------------------------


def generate(rounds: int) -> None:
    """The same command from the inside."""
    found = [child("generate") for _ in range(rounds)]
    whole = statistics.median(laps["all"] for laps in found)
    rows = []
    for name in found[0]:
        seconds = statistics.median(laps[name] for laps in found)
        if name == "all" or seconds < 0.005:
            continue
        rows.append([name, f"{seconds:.2f}", f"{100 * seconds / whole:.0f} %"])
    table(("part of `cascade generate`", "CPU, s", "of all"), [*rows, ["main thread, all", f"{whole:.2f}", ""]])


def inside(rounds: int) -> None:
    rows = []
    for row in child("inside", rounds):
        shares = [f"{100 * share:.0f} %" for name, share in row.items() if name not in ("stage", "seconds")]
        rows.append([row["stage"], f"{row['seconds']:.3f}", *shares])
    kinds = [name for name in row if name not in ("stage", "seconds")]
    table(("stage", "CPU, s", *kinds), rows)


def waste(rounds: int) -> None:
    rows = []
    for row in child("waste", rounds):
        once, each, apart, joint = (1e3 * row[name] for name in ("once", "each", "apart", "joint"))
        rows.append(
            [row["stage"], f"{each:.0f}", f"{once:.0f}", f"{apart:.0f}", f"{joint:.0f}", f"{row['apart by']:.1e}"]
        )
    kinds = ("text at every call", "text once", "two calls", "one batch", "largest difference")
    table(("stage, CPU ms", *kinds), rows)


# size ----------------------------------------------------------------------------------------------------------------


def scaling(plot: Path | None, quick: bool) -> None:
    """One call of the network at other sizes, on one thread."""
    frames, sides = (FRAMES[:2], SIDES[:2]) if quick else (FRAMES, SIDES)
    sizes = list(dict.fromkeys([*((f, 64) for f in frames), *((16, side) for side in sides)]))
    found = {
        name: {size: child("scaling", stage, *size, window) for size in sizes}
        for name, (stage, window) in CURVES.items()
    }
    head = ("frames x side", *(f"{name}: {unit}" for name in found for unit in ("CPU, s", "MiB")))
    rows = []
    for size in sizes:
        cells = [(one[size]["seconds"], one[size]["bytes"] / 2**20) for one in found.values()]
        rows.append([f"{size[0]} x {size[1]}", *(cell for s, mib in cells for cell in (f"{s:.2f}", f"{mib:.0f}"))])
    table(head, rows)
    if plot is not None:
        draw(found, frames, sides, plot)


def draw(found: dict[str, Any], frames: Sequence[int], sides: Sequence[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for column, (label, at) in enumerate(
        (
            ("frames, at 64 x 64 pixels", [(f, 64) for f in frames]),
            ("side in pixels, 16 frames", [(16, s) for s in sides]),
        )
    ):
        x = [size[column] for size in at]
        for row, (unit, key, scale) in enumerate((("CPU seconds", "seconds", 1), ("MiB at the peak", "bytes", 2**20))):
            axis = axes[row][column]
            for name, curve in found.items():
                axis.plot(x, [curve[size][key] / scale for size in at], "o-", label=name, markersize=4)
            first = min(curve[at[0]][key] / scale for curve in found.values())
            power = 1 if column == 0 else 2
            axis.plot(x, [first * (v / x[0]) ** power for v in x], ":", color="grey", label="linear in pixels x frames")
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel=unit, xticks=x, xticklabels=x)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    print(f"\n{path}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--parts", default=",".join(PARTS))
    ask.add_argument("--plot", type=Path, help="write the curves of `scaling` there")
    ask.add_argument("--quick", action="store_true")
    given = ask.parse_args()
    rounds = 1 if given.quick else given.rounds
    load = " ".join(f"{n:.1f}" for n in os.getloadavg())
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, load when it began {load}; {rounds} rounds.")
    parts = {"start": start, "generate": generate, "inside": inside, "waste": waste}
    for name in given.parts.split(","):
        if name == "scaling":
            scaling(given.plot, given.quick)
        else:
            parts[name](rounds)


if __name__ == "__main__":
    main()
