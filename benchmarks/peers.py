"""Our denoiser and our cascade beside those of others, in one run: speed, memory, and the ceiling of the machine.

    make bench ARGS="--quick --json FILE"     10M parameters, 16x32x32, one thread, forward alone: minutes
    make bench                                everything below: hours on an idle machine
    make bench ARGS="--parts 1,7"              parts of that, numbered as in FULL

Networks have random weights and as many parameters as each other (benchmarks/peers.yaml). Each is a process of its own
that waits while another works (benchmarks/peer_child.py); rounds go over all of them in turn, so that whatever
slows the machine slows everyone. Time is CPU time of the process with one thread and wall time with more; beside it
stands how fast a matrix product is at that moment. FLOPs are counted alike for all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peer_tables import WIDE, Row, apart, summary, table

HERE = Path(__file__).resolve().parent
PACKAGES = ("imagen-pytorch", "make-a-video-pytorch", "video-diffusion-pytorch", "diffusers", "transformers")


@dataclass(frozen=True)
class Part:
    """What is compared at once."""

    size: str  # a key of every network in the settings
    shape: str
    threads: int = 1
    tasks: tuple[str, ...] = ("forward",)
    among: str = "networks"  # the section of the settings

    @property
    def name(self) -> str:
        what = {"networks": "", "chains": "whole cascades, ", "equal": "equal architecture, "}[self.among]
        return f"{what}{self.size}, {self.shape}, {self.threads} thread{'s' * (self.threads > 1)}"


QUICK = [Part("10M", "16x32x32")]
FULL = [
    Part("10M", "16x32x32", tasks=("forward", "train")),
    Part("50M", "16x32x32", tasks=("forward", "train")),
    Part("10M", "16x64x64"),
    Part("50M", "16x64x64"),
    Part("10M", "16x32x32", threads=2),
    Part("50M", "16x32x32", threads=2),
    Part("10M", "16x64x64", among="chains"),
    Part("10M", "16x32x32", tasks=("forward", "train"), among="equal"),
    Part("50M", "16x32x32", tasks=("forward", "train"), among="equal"),
]


class Refused(Exception):
    """A network cannot be measured; the message says why."""


class Child:
    """The process of one network; see peer_child.py."""

    def __init__(self, name: str, settings: dict[str, Any], part: Part, limit: float) -> None:
        self.limit, threads = limit, part.threads
        frames, height, width = settings["shapes"][part.shape]
        text = {"tokens": settings["text"]["tokens"], "text": settings["text"]["width"]}
        spec = {
            "package": name.removesuffix(WIDE),
            "settings": settings[part.among][name][part.size],
            "work": {"frames": frames, "height": height, "width": width, **text},
            "threads": threads,
            "seconds": settings["seconds"],
            "named": part.among == "equal",
        }
        # A thread that spins while it waits takes the time of the others.
        own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(HERE.parent)}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "peer_child.py"), json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=os.environ | own, text=True,
        )  # fmt: skip

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            raise Refused(f"no answer in {self.limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            raise Refused(said[-1] if said else f"it ended with code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure(part: Part, settings: dict[str, Any], names: Sequence[str], rounds: int, limit: float) -> list[Row]:
    """The rows of `names`, ours first. Whoever fails has a reason in `refused`, the others go on."""
    rows = [Row(name) for name in names]
    with contextlib.ExitStack() as stack:
        children = {}
        for row in rows:
            say(f"{part.name}: {row.name}")
            child = Child(row.name, settings, part, limit)
            stack.callback(child.close)
            with refusing(row):
                built = child.answer()
                row.params, row.flops, row.bytes = built["params"], built["flops"], built["bytes"]
                row.output = built["output"]
                children[row.name] = child
        for task in part.tasks:
            for number in range(rounds):
                say(f"{part.name}: {task}, round {number + 1} of {rounds}")
                for row in turned(rows, number):
                    if not row.refused:
                        with refusing(row, task):
                            row.rounds.setdefault(task, []).append(children[row.name].ask(task))
    return rows


@contextlib.contextmanager
def refusing(row: Row, task: str = "") -> Iterator[None]:
    """Whoever fails has no rounds of that task, and a reason."""
    try:
        yield
    except Refused as reason:
        row.refused = str(reason)[:200]
        row.rounds.pop(task, None)
        say(f"{row.name}: {row.refused}")


def turned(rows: list[Row], number: int) -> list[Row]:
    """The rows from another one on in every round: nobody always follows the same neighbour."""
    first = number % len(rows)
    return rows[first:] + rows[:first]


def profile(settings: dict[str, Any], part: Part, limit: float) -> str:
    """Where our own time goes, by kind of operation, against the ceiling."""
    child = Child(settings["ours"], settings, part, limit)
    try:
        child.answer()
        found = child.ask("profile")
    finally:
        child.close()
    lines = ["| operations | of the time | of GEMM |", "|---|---|---|"]
    for name, each in sorted(found["kinds"].items(), key=lambda item: -item[1]["share"]):
        speed = f"{100 * each['speed'] / found['gemm']:.0f} %" if each["speed"] else ""
        lines.append(f"| {name} | {100 * each['share']:.1f} % | {speed} |")
    return "\n".join(lines)


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def versions() -> str:
    """Of what is compared, as installed here."""
    found = []
    for package in ("torch", *PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def machine() -> str:
    """Processor, cores and how busy they are."""
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or 'unknown processor'}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def chosen(settings: dict[str, Any], part: Part, only: Sequence[str], wide: bool) -> list[str]:
    """The networks of a part, ours first. Raises SystemExit for a name that is unknown."""
    known = settings[part.among]
    if unknown := set(only) - set(settings["networks"]) - set(settings["chains"]):
        raise SystemExit(f"error: --only {', '.join(unknown)}: not in the settings. Fix: {', '.join(known)}")
    names = [name for name, sizes in known.items() if part.size in sizes and (wide or not name.endswith(WIDE))]
    return [name for i, name in enumerate(names) if i == 0 or not only or name in only]


def main() -> None:
    import yaml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10M, 16x32x32, one thread, forward")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the ratios of the first part, as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="every round's answers, a line of JSON a part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", help="numbers of the parts of a full run, from 1, such as 1,3")
    parser.add_argument("--tasks", default="forward,train", help="of each part, those of these that it has")
    parser.add_argument("--only", default="", help="these peers, separated by commas")
    parser.add_argument("--limit", type=float, default=900, help="seconds that one answer may take")
    parser.add_argument("--settings", type=Path, default=HERE / "peers.yaml")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit ends the children, a signal would leave them
    settings = yaml.safe_load(args.settings.read_text())
    parts = QUICK if args.quick else FULL
    if args.parts:
        parts = [parts[int(number) - 1] for number in args.parts.split(",")]
    tasks = args.tasks.split(",")
    parts = [replace(part, tasks=tuple(task for task in part.tasks if task in tasks)) for part in parts]
    only = [name for name in args.only.split(",") if name]
    print(f"{machine()}; {args.rounds} rounds\n{versions()}")
    began, first, refused = time.perf_counter(), True, 0
    for part in parts:
        clock = "cpu" if part.threads == 1 else "wall"
        rows = measure(part, settings, chosen(settings, part, only, wide=not args.quick), args.rounds, args.limit)
        refused += sum(bool(row.refused) for row in rows)
        if rows[0].refused:
            print(f"\n{part.name}: {rows[0].name}: {rows[0].refused}")
            continue
        for task in part.tasks:
            print(f"\n{part.name}: {task}\n\n{table(rows, task, clock)}", flush=True)
        if part.among == "equal":
            print(f"\noutputs differ by {apart(rows):.1e} of the greatest number")
        if first and args.json:
            args.json.write_text(json.dumps(summary(rows, "forward", clock), indent=1) + "\n")
        if args.log:
            with args.log.open("a") as file:
                file.write(json.dumps({"part": part.name, "rows": [vars(row) for row in rows]}) + "\n")
        first = False
    if not args.quick and not args.parts:
        for part in FULL[:2]:
            print(f"\nours, {part.name}, where the time goes\n\n{profile(settings, part, args.limit)}", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s, {machine()}")
    if refused:
        raise SystemExit(f"error: {refused} networks could not be measured, the tables say why")


if __name__ == "__main__":
    main()
