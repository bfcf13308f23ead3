"""What a training carries from step to step, and how it is told to stop."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from cascade import checkpoint, store
from cascade.settings import TrainConfig


@dataclass
class State:
    """What a checkpoint of a training holds."""

    net: nn.Module
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: Any = None  # torch.amp.GradScaler with precision fp16
    step: int = 0

    @staticmethod
    def new(net: nn.Module, cfg: TrainConfig, scaler: Any) -> State:
        optimizer = torch.optim.AdamW(
            groups(net), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True
        )
        # constants of the network (buffers) stand in it as well, and stay: weights without them could not be loaded
        return State(net, {name: value.detach().clone() for name, value in net.state_dict().items()}, optimizer, scaler)

    def meta(self) -> dict[str, Any]:
        return {"step": self.step} | ({} if self.scaler is None else {"scaler": self.scaler.state_dict()})

    def files(self) -> dict[str, bytes]:
        names = [name for name, _ in self.net.named_parameters()]
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{names[i]}|{key}": value for i, state in moments.items() for key, value in state.items()}
        parts = {"model": self.net.state_dict(), "ema": self.average, "optimizer": flat}
        return {f"{name}.safetensors": store.tensors_to_bytes(tensors) for name, tensors in parts.items()}

    def restore(self, artefact: store.Artefact) -> None:
        parts = {name.split(".")[0]: store.bytes_to_tensors(data) for name, data in artefact.files.items()}
        checkpoint.apply(self.net, parts["model"], str(artefact.path))
        for name, value in parts["ema"].items():
            self.average[name].copy_(value)
        parameters = dict(self.net.named_parameters())
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        for name, value in parts["optimizer"].items():
            parameter, key = name.split("|")
            # Fused AdamW walks through memory: moments must have their parameter's strides, safetensors keeps none.
            like = parameters[parameter]
            same = value.shape == like.shape and key != "step"
            moments[parameter][key] = torch.empty_like(like).copy_(value) if same else value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(enumerate(moments.values()))})
        if self.scaler is not None:
            self.scaler.load_state_dict(artefact.meta["scaler"])
        self.step = int(artefact.meta["step"])

    def update_average(self, decay: float) -> None:
        """EMA whose decay grows as (1 + step) / (10 + step), so that early weights are forgotten."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = dict(self.net.named_parameters())
            torch._foreach_lerp_([self.average[name] for name in current], list(current.values()), 1 - decay)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """The parameters of a network for the optimizer, those of one `pace` (of the learning rate) after another.

    A part that learns faster than the rest says so by its attribute `pace`; it comes after the rest in `net`.
    """
    faster = [module for module in net.modules() if hasattr(module, "pace")]
    theirs = {id(parameter) for module in faster for parameter in module.parameters()}
    rest = [parameter for parameter in net.parameters() if id(parameter) not in theirs]
    parts = [{"params": rest, "pace": 1.0}]
    return parts + [{"params": list(module.parameters()), "pace": module.pace} for module in faster]


class Signals:
    """Inside, SIGINT and SIGTERM wait (`seen`) and are obeyed at the end, so that no step is cut in two.

    A second signal is obeyed at once. Ignored signals stay ignored (`nohup`, a shell's background jobs), and outside
    the main thread, which alone may handle signals, nothing changes.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        self.seen = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.restore()
        if self.seen and kind is None:
            signal.raise_signal(self.seen)
            raise KeyboardInterrupt  # whose handler only returned: what was cut short must not pass for finished
