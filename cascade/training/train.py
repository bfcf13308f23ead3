"""One training loop for every stage and every kind of distillation.

What a step sees follows from (seed, step) alone: training example i is drawn from generators keyed by i, and step s
takes examples s * batch ... (s + 1) * batch - 1, however many processes or micro-batches share them. So resuming needs
the weights, their average, the optimizer's moments and the step, and is equal to never having stopped. (A loss that
compares clips with each other sees those of one process and micro-batch; it names their number among its `inputs`.)
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade import store
from cascade.config import fingerprint, plain
from cascade.data.source import Source
from cascade.errors import ConfigError, NumericError
from cascade.nets.unet import VideoUNet
from cascade.nets.unet3d import UNet3D
from cascade.settings import TrainConfig
from cascade.stage import Batch, Stage
from cascade.text import Text
from cascade.training.examples import Draw, Examples, batches
from cascade.training.state import Signals, State

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[Batch, Callable[..., Tensor]], Tensor]  # (batch, network) -> (B,)
Preview = Callable[[dict[str, Tensor], int], bytes]  # (averaged weights, step) -> a PNG
LOGISTIC = ("checkpoint_every", "sample_every", "keep", "workers", "micro_batch", "checkpointing")  # change no result
# Settings of a stage that its own loss does not see.
SAMPLING = ("sampler", "windows", "augment", "compile", "dtype", "offload", "frames_at_once", "keep_known")


class Journal:
    """What a training shows: a progress bar with loss, rate and time left, and TensorBoard under `out`."""

    def __init__(self, out: Path, name: str, cfg: TrainConfig, step: int, show: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(
            total=cfg.steps, initial=step, desc=name, unit="step", dynamic_ncols=True, smoothing=0.05, disable=not show
        )

    def note(self, step: int, loss: float, norm: float, rate: float) -> None:
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
        self.writer.add_scalar("loss", loss, step)
        self.writer.add_scalar("gradient_norm", norm, step)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Linear warm-up, then linear decay that reaches zero after the last step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * (cfg.steps - step) / max(1, cfg.steps - cfg.warmup)


def fit(
    stage: Stage,
    source: Source,
    encode: Callable[[list[str]], Text],
    cfg: TrainConfig,
    out: Path,
    *,
    loss: Loss | None = None,
    preview: Preview | None = None,
    progress: bool = True,
    inputs: Any = None,
    pool: Draw | None = None,
) -> dict[str, Tensor]:
    """Trains `stage.net` in place and returns the averaged weights; resumes from the newest checkpoint in `out`.

    Checkpoints are out/step-NNNNNN; `preview(average, step)` makes the PNG of out/samples-NNNNNN.png. `inputs` is plain
    data that names what else decides the result: the data set, the text encoder. `pool` draws what makes the examples
    instead of `source` and `encode`. On SIGINT and SIGTERM the step is finished and saved first. Under
    `accelerate launch` all processes return the same weights, the first one writes.

    Raises NumericError before a NaN or infinity reaches the weights, ConfigError if `out` holds a training with other
    settings or the settings do not suit the device, LockedError while another training works in `out`.
    """
    accelerator = accelerator_of(cfg, stage.device)
    device = stage.device if accelerator.num_processes == 1 else accelerator.device
    net = stage.net.to(device).train()
    recompute(net, cfg.checkpointing)
    state = State.new(net, cfg, accelerator.scaler)
    objective = stage.loss if loss is None else loss
    identity = fingerprint(settings(stage, cfg, own=loss is None) | {"inputs": inputs})
    writes = accelerator.is_main_process
    with store.lock(out) if writes else nullcontext(), products(cfg, device):
        accelerator.wait_for_everyone()  # the others read once the lock is held and a dead run's remains are gone
        resume(state, out, identity)
        model, optimizer = accelerator.prepare(net, state.optimizer, device_placement=[False, False])
        drawn = None if pool is None or state.step == cfg.steps else replace(pool(), stage=stage, cfg=cfg)
        journal = Journal(out, stage.cfg.name, cfg, state.step, progress) if writes else None
        stop = False
        with Signals() as signals:  # the loader's processes begin in here, so that they wait for the step too
            if drawn is None:
                loader = batches(Examples(stage, source, encode, cfg), cfg, state.step, accelerator)
            else:
                loader = drawn.batches(state.step, accelerator)
            try:
                while state.step < cfg.steps and not stop:
                    rate = learning_rate(cfg, state.step)
                    for group in optimizer.param_groups:
                        group["lr"] = rate * group["pace"]
                    value, norm = one_step(accelerator, model, optimizer, objective, loader, cfg, state.step)
                    state.step += 1
                    state.update_average(cfg.ema)
                    stop = mean(accelerator, float(signals.seen > 0)) > 0
                    if journal is not None:
                        journal.note(state.step, value, norm, rate)
                        milestone(state, cfg, out, identity, preview, stop)
            finally:
                if journal is not None:
                    journal.close()
                accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            accelerator.wait_for_everyone()  # the last checkpoint is written
            if stop and not signals.seen:
                signals.seen = signal.SIGTERM  # another process was asked to stop
    return state.average


def here(device: torch.device) -> torch.device:
    """Where this process works: its own GPU under `accelerate launch`."""
    from accelerate import PartialState

    everyone = PartialState(cpu=device.type == "cpu")
    return device if everyone.num_processes == 1 else everyone.device


def first_process() -> bool:
    """Whether this is the process that writes, under `accelerate launch`."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def accelerator_of(cfg: TrainConfig, device: torch.device) -> Accelerator:
    """Processes and precision. ConfigError for fp16 on the CPU, which would silently be float32."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    if cfg.precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision is fp16, which needs a GPU", fix="train.precision=bf16")
    AcceleratorState._reset_state()  # else all trainings in one process would have to agree on the precision
    # Guidance-distilled networks alone are told w: for the others its projection is never used.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    mixed = "no" if cfg.precision == "tf32" else cfg.precision
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[unused])


def recompute(net: nn.Module, on: bool) -> None:
    able = [module for module in net.modules() if isinstance(module, VideoUNet | UNet3D)]
    for module in able:
        module.checkpointing = on
    if on and not able:
        raise ConfigError(f"{type(net).__name__} cannot recompute its activations", fix="train.checkpointing=false")


def settings(stage: Stage, cfg: TrainConfig, own: bool) -> dict[str, Any]:
    """The settings that decide the result; `own`: the loss is the stage's own, which does not see the sampler."""
    unseen = ("train", "weights", *(SAMPLING if own else ()))
    return {"stage": without(plain(stage.cfg), unseen), "train": without(plain(cfg), LOGISTIC)}


def mean(accelerator: Accelerator, value: float) -> float:
    """The mean of `value` over all processes."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), reduction="mean"))


def one_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    objective: Loss,
    loader: Iterator[Batch],
    cfg: TrainConfig,
    step: int,
) -> tuple[float, float]:
    """Gradient accumulation over a step's micro-batches and one update; returns the mean loss and gradient norm."""
    rounds = cfg.batch // (cfg.micro_batch or cfg.batch)
    device = next(model.parameters()).device
    optimizer.zero_grad()
    total = 0.0
    for i in range(rounds):
        batch = next(loader).to(device)
        quiet = accelerator.no_sync(model) if i + 1 < rounds else nullcontext()
        with quiet, accelerator.autocast():
            value = objective(batch, model).mean() / rounds
            accelerator.backward(value)
        total += value.item()
    total = mean(accelerator, total)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), cfg.clip))
    # In fp16 the scaler skips an update whose gradient overflowed.
    if not math.isfinite(total) or not (math.isfinite(norm) or cfg.precision == "fp16"):
        first = step * cfg.batch
        raise NumericError(
            f"training step {step + 1}: loss {total}, gradient norm {norm} (examples {first} to "
            f"{first + cfg.batch - 1}); the last checkpoint is whole",
            fix="train.lr=... smaller, or train.clip=... smaller",
        )
    optimizer.step()
    return total, norm


@contextmanager
def products(cfg: TrainConfig, device: torch.device) -> Iterator[None]:
    """Below full precision, what is left in float32 runs on a GPU's tensor cores as TF32 inside; at full none does."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if cfg.precision == "no" else "high")
    torch.backends.cudnn.allow_tf32 = cfg.precision != "no"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def resume(state: State, out: Path, identity: str) -> None:
    """Restores the newest checkpoint of `out`, if there is one."""
    newest = store.latest(out)
    if newest is None:
        return
    artefact = store.read(newest, kind="training")
    if artefact.meta["identity"] != identity:
        raise ConfigError(f"{out} holds a training with other settings or clips", fix="out=ANOTHER_DIRECTORY")
    state.restore(artefact)


def milestone(
    state: State, cfg: TrainConfig, out: Path, identity: str, preview: Preview | None, stop: bool = False
) -> None:
    """Writes what is due after this step: a checkpoint, a contact sheet."""
    step, last = state.step, state.step == cfg.steps
    # The sheet first: killed in between, the step is done again and so is the sheet.
    if preview is not None and cfg.sample_every and (step % cfg.sample_every == 0 or last):
        store.write_file(out / f"samples-{step:07d}.png", preview(state.average, step))
    if step % cfg.checkpoint_every == 0 or last or stop:
        meta = {**state.meta(), "identity": identity}
        store.commit(out / f"step-{step:07d}", state.files(), kind="training", meta=meta)
        store.prune(out, cfg.keep)


def without(tree: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}
