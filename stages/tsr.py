"""Temporal super-resolution: k times as many frames, F -> kF (Imagen Video, sec. 2.3)."""

from __future__ import annotations

from dataclasses import dataclass

from cascade.temporal import KEEPS_KNOWN, METRICS, TemporalConfig, condition, degrade, output, rate, takes

__all__ = ["KEEPS_KNOWN", "METRICS", "Config", "condition", "degrade", "output", "rate", "takes"]


@dataclass(kw_only=True)
class Config(TemporalConfig):
    def made(self, given: int) -> int:
        return given * self.factor

    def given(self, made: int) -> int:
        return made // self.factor


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("tsr")
