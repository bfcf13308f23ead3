"""`cascade info` and `cascade list`: what there is on this machine."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

from cascade import __version__, attention
from cascade.chain import Chain, chain_settings
from cascade.config import package_root


def info() -> None:
    """Versions, device and attention kernels."""
    print(f"cascade {__version__}, python {sys.version.split()[0]}, torch {torch.__version__}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"cuda: {gpu}, threads {torch.get_num_threads()}")
    q = torch.zeros(1, 1, 1, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    print(f"attention: {', '.join(attention.kernels())}; auto is {attention.select('auto', q)}")


def list_() -> None:
    """Chains, what they are and whether their weights are here; stages."""
    conf = package_root() / "conf"
    for path in sorted((conf / "chain").rglob("*.yaml")):
        name = path.relative_to(conf / "chain").with_suffix("").as_posix()
        chain = Chain.read(chain_settings(name))
        absent = ", ".join(chain.absent())
        weights = f"weights of {absent} are not here" if absent else "weights are here"
        print(f"chain={name}: {', '.join(stage.name for stage in chain.stages)}; {weights}")
        print("".join(f"    {line}\n" for line in opening(path)), end="")
    names = sorted(path.relative_to(conf / "stage").with_suffix("").as_posix() for path in conf.glob("stage/**/*.yaml"))
    print(f"stage={' '.join(names)}")


def opening(path: Path) -> list[str]:
    """The comment that a settings file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return [line.lstrip("# ") for line in lines if "@package" not in line]
