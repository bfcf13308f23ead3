"""One training loop for every stage and every kind of distillation.

What a step sees follows from (seed, step) alone: training example i is drawn from generators keyed by i, and step s
takes examples s * batch ... (s + 1) * batch - 1, however many processes or micro-batches share them. So resuming needs
the weights, their average, the optimizer's moments and the step, and is equal to never having stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade import checkpoint, store
from cascade.config import fingerprint, plain
from cascade.data.source import Source
from cascade.errors import ConfigError, NumericError
from cascade.noise import generator
from cascade.stage import Batch, Stage, TrainConfig
from cascade.text import Text
from cascade.video import Shape, Video

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[Batch, Callable[..., Tensor]], Tensor]  # (batch, network) -> (B,)
LOGISTIC = ("checkpoint_every", "sample_every", "keep", "workers", "micro_batch", "checkpointing")  # change no result


class Examples(torch.utils.data.Dataset[Batch]):
    """Training examples of `stage`, example `index` being the same whenever and wherever it is asked for."""

    def __init__(self, stage: Stage, source: Source, encode: Callable[[list[str]], Text], cfg: TrainConfig) -> None:
        self.stage = Stage(stage.cfg, stage.rule, net=nn.Identity())
        self.source, self.cfg = source, cfg
        self.encode = lru_cache(maxsize=20_000)(lambda caption: encode([caption]))

    def __len__(self) -> int:
        return self.cfg.steps * self.cfg.batch

    def __getitem__(self, index: int) -> Batch:
        cfg, shape = self.cfg, self.stage.cfg.shape
        rng = generator(cfg.seed, "train", index)
        frames, caption = self.source.sample(shape, self.stage.cfg.fps, cfg.seed, "train", index)
        video = Video(frames[None], self.stage.cfg.fps)
        if cfg.crop is not None:
            video = crop(video, cfg.crop, self.stage.rule.rate(self.stage.cfg), rng)
        text = self.encode(caption).drop(torch.rand(1, generator=rng) >= cfg.drop_text)
        segments = None
        if torch.rand((), generator=rng) < cfg.images:
            length = video.shape.frames
            segments = torch.arange(length)[None]
            video = Video(video.frames[:, :, torch.randperm(length, generator=rng)], video.fps)
        x, cond = self.stage.example(video, text, rng)
        cond.segments = segments
        # Times are spread evenly over a step's batch: a uniform law with less variance than independent draws.
        step, place = divmod(index, cfg.batch)
        offset = torch.rand(1, generator=generator(cfg.seed, "time", step))
        return Batch(x, torch.randn(x.shape, generator=rng), (offset + place / cfg.batch) % 1, cond)


def crop(video: Video, size: Shape, rate: int, rng: torch.Generator) -> Video:
    """A random part of `video`; its first frame is at a multiple of `rate`, so that known frames stay known."""
    whole = video.shape
    if size.frames > whole.frames or size.height > whole.height or size.width > whole.width:
        raise ConfigError(f"train.crop is {size}, larger than the clip ({whole})", fix=f"train.crop within {whole}")

    def start(room: int, step: int = 1) -> int:
        return step * int(torch.randint(room // step + 1, (), generator=rng))

    f, y, x = (
        start(whole.frames - size.frames, rate),
        start(whole.height - size.height),
        start(whole.width - size.width),
    )
    part = video.frames[:, :, f : f + size.frames, y : y + size.height, x : x + size.width]
    return Video(part, video.fps)


@dataclass
class State:
    """What a checkpoint of a training holds."""

    net: nn.Module
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0

    def files(self) -> dict[str, bytes]:
        names = [name for name, _ in self.net.named_parameters()]
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{names[i]}|{key}": value for i, state in moments.items() for key, value in state.items()}
        parts = {"model": self.net.state_dict(), "ema": self.average, "optimizer": flat}
        return {f"{name}.safetensors": store.tensors_to_bytes(tensors) for name, tensors in parts.items()}

    def restore(self, path: Path) -> None:
        artefact = store.read(path, kind="training")
        parts = {name.split(".")[0]: store.bytes_to_tensors(data) for name, data in artefact.files.items()}
        checkpoint.apply(self.net, parts["model"], str(path))
        for name, value in parts["ema"].items():
            self.average[name].copy_(value)
        index = {name: i for i, (name, _) in enumerate(self.net.named_parameters())}
        moments: dict[int, dict[str, Tensor]] = {i: {} for i in index.values()}
        for name, value in parts["optimizer"].items():
            parameter, key = name.split("|")
            moments[index[parameter]][key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.step = int(artefact.meta["step"])

    def update_average(self, decay: float) -> None:
        """EMA whose decay grows as (1 + step) / (10 + step), so that early weights are forgotten."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = dict(self.net.named_parameters())
            torch._foreach_lerp_([self.average[name] for name in current], list(current.values()), 1 - decay)


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
    preview: Callable[[dict[str, Tensor], int], bytes] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Trains `stage.net` in place and returns the averaged weights; resumes from the newest checkpoint in `out`.

    Checkpoints are out/step-NNNNNN; `preview(average, step)` makes the PNG of out/samples-NNNNNN.png. Raises NumericError
    before a NaN or infinity reaches the weights, ConfigError if `out` holds a training with other settings.
    """
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(mixed_precision=cfg.precision, cpu=stage.device.type == "cpu")
    net = stage.net.train()
    identity = fingerprint({"stage": plain(stage.cfg), "train": without(plain(cfg), LOGISTIC)})
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True
    )
    state = State(net, {name: value.detach().clone() for name, value in net.named_parameters()}, optimizer)
    with store.lock(out) if accelerator.is_main_process else nullcontext():
        resume(state, out, identity)
        model, optimizer = accelerator.prepare(net, optimizer)
        loader = batches(Examples(stage, source, encode, cfg), cfg, state.step, accelerator)
        writer = tracker(out, state.step) if accelerator.is_main_process else None
        bar = tqdm(
            total=cfg.steps, initial=state.step, desc=stage.cfg.name, unit="step", dynamic_ncols=True, smoothing=0.05,
            disable=not progress or not accelerator.is_main_process,
        )  # fmt: skip
        objective = loss or stage.loss
        while state.step < cfg.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg, state.step)
            value, norm = one_step(accelerator, model, optimizer, objective, loader, cfg, state.step)
            state.step += 1
            state.update_average(cfg.ema)
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", lr=f"{learning_rate(cfg, state.step - 1):.1e}", refresh=False)
            if writer is not None:
                writer.add_scalar("loss", value, state.step)
                writer.add_scalar("gradient_norm", norm, state.step)
            if accelerator.is_main_process:
                milestone(state, cfg, out, identity, preview)
        bar.close()
        if writer is not None:
            writer.close()
    return state.average


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
    optimizer.zero_grad()
    total = 0.0
    for i in range(rounds):
        batch = next(loader).to(accelerator.device)
        quiet = accelerator.no_sync(model) if i + 1 < rounds else nullcontext()
        with quiet, accelerator.autocast():
            value = objective(batch, model).mean() / rounds
            accelerator.backward(value)
        total += value.item()
    norm = float(accelerator.clip_grad_norm_(model.parameters(), cfg.clip))
    if not math.isfinite(total) or not (math.isfinite(norm) or cfg.precision == "fp16"):
        first = step * cfg.batch
        raise NumericError(
            f"training step {step + 1}: loss {total}, gradient norm {norm} (examples {first} to {first + cfg.batch - 1}); "
            "weights are unchanged since the last checkpoint",
            fix="train.lr=... smaller, or train.clip=... smaller",
        )
    optimizer.step()
    return total, norm


def batches(examples: Examples, cfg: TrainConfig, start: int, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's share of every micro-batch from step `start` on."""
    world, rank = accelerator.num_processes, accelerator.process_index
    micro = cfg.micro_batch or cfg.batch
    if micro % world:
        raise ConfigError(f"{micro} clips at once cannot be shared by {world} processes", fix=f"train.batch={world * 8}")
    share = micro // world
    plan = [
        list(range(first + rank * share, first + (rank + 1) * share))
        for first in range(start * cfg.batch, cfg.steps * cfg.batch, micro)
    ]
    return iter(
        torch.utils.data.DataLoader(
            examples, batch_sampler=plan, collate_fn=Batch.cat, num_workers=cfg.workers, persistent_workers=False
        )
    )


def resume(state: State, out: Path, identity: str) -> None:
    """Restores the newest checkpoint of `out`, if there is one."""
    newest = store.latest(out)
    if newest is None:
        return
    if store.read(newest, kind="training").meta["identity"] != identity:
        raise ConfigError(f"{out} holds a training with other settings", fix="out=ANOTHER_DIRECTORY")
    state.restore(newest)


def milestone(state: State, cfg: TrainConfig, out: Path, identity: str, preview: Callable[[dict[str, Tensor], int], bytes] | None) -> None:
    """Writes what is due after this step: a checkpoint, a contact sheet."""
    step, last = state.step, state.step == cfg.steps
    if step % cfg.checkpoint_every == 0 or last:
        meta = {"step": step, "identity": identity}
        store.commit(out / f"step-{step:07d}", state.files(), kind="training", meta=meta)
        store.prune(out, cfg.keep)
    if preview is not None and cfg.sample_every and (step % cfg.sample_every == 0 or last):
        store.write_file(out / f"samples-{step:07d}.png", preview(state.average, step))


def tracker(out: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=step)


def without(tree: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}
