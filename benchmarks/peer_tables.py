"""What the rounds of peers.py say: ratios within a round, tables, the JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

HEAD = "network | M parameters | GFLOP | {} ms | GFLOP/s | of GEMM | peak MB | times per FLOP | times"
COLUMNS = HEAD.count("|") + 1
WIDE = " wide"  # of a name: another shape of the same package


@dataclass
class Row:
    """What is known of one network in one part; `rounds` holds a child's answers by task."""

    name: str
    params: int = 0
    flops: int = 0
    bytes: int = 0
    output: list[float] = field(default_factory=list)  # some of its numbers
    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    refused: str = ""  # why a task has no rounds, and nothing was asked after it

    def speeds(self, task: str, clock: str) -> list[float]:
        """FLOP per second of every round; a training step counts as one forward pass."""
        return [self.flops / answer[clock] for answer in self.rounds.get(task, [])]

    def fraction(self, task: str, clock: str) -> float:
        """Of the ceiling beside it."""
        ceilings = [answer[f"gemm_{clock}"] for answer in self.rounds[task]]
        return median(a / b for a, b in zip(self.speeds(task, clock), ceilings, strict=True))


def ratios(rows: list[Row], task: str, clock: str) -> dict[str, list[float]]:
    """Our speed over each peer's, of every round both took part in."""
    ours = rows[0].speeds(task, clock)
    return {
        row.name: [a / b for a, b in zip(ours, row.speeds(task, clock), strict=True)]
        for row in rows[1:]
        if ours and task in row.rounds
    }


def summary(rows: list[Row], task: str, clock: str) -> dict[str, Any]:
    """For `--json`: our fraction of the ceiling, and the median ratio to every peer."""
    found = {name: median(each) for name, each in ratios(rows, task, clock).items() if not name.endswith(WIDE)}
    return {"gemm_fraction": rows[0].fraction(task, clock), "ratios": found}


def table(rows: list[Row], task: str, clock: str) -> str:
    """Markdown. Times per FLOP: our speed over theirs, median (least to greatest of rounds); times: by the clock."""
    lines = [f"| {HEAD.format(clock)} |", "|---" * COLUMNS + "|"]
    found = ratios(rows, task, clock)
    for row in rows:
        if task not in row.rounds:
            lines.append(f"| {row.name} | {row.refused} |" + " |" * (COLUMNS - 2))
            continue
        seconds = median(answer[clock] for answer in row.rounds[task])
        peak = max(answer["bytes"] for answer in row.rounds[task]) if task == "train" else row.bytes
        cells = [row.name, f"{row.params / 1e6:.1f}", f"{row.flops / 1e9:.1f}", f"{1e3 * seconds:.0f}"]
        cells += [f"{median(row.speeds(task, clock)) / 1e9:.1f}", f"{100 * row.fraction(task, clock):.0f} %"]
        cells += [f"{peak / 1e6:.0f}"]
        if row.name in found:
            each = found[row.name]
            ours = median(answer[clock] for answer in rows[0].rounds[task])
            cells += [f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})", f"{seconds / ours:.2f}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def apart(rows: list[Row]) -> float:
    """Greatest difference between our output and another's, over our greatest number."""
    ours = rows[0].output
    gaps = [abs(a - b) for row in rows[1:] if row.output for a, b in zip(ours, row.output, strict=True)]
    return max(gaps, default=0.0) / max(map(abs, ours))
