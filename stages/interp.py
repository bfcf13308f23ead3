"""Frame interpolation: k - 1 new frames between each two, F -> (F - 1)k + 1 (Make-A-Video, sec. 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from cascade.temporal import KEEPS_KNOWN, METRICS, TemporalConfig, condition, degrade, output, rate, takes

__all__ = ["KEEPS_KNOWN", "METRICS", "Config", "condition", "degrade", "output", "rate", "takes"]


@dataclass(kw_only=True)
class Config(TemporalConfig):
    def made(self, given: int) -> int:
        return (given - 1) * self.factor + 1

    def given(self, made: int) -> int:
        return (made - 1) // self.factor + 1


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("interp")
