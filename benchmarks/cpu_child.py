"""What benchmarks/cpu.py measures in processes of their own: each prints one line of JSON and ends.

Seconds are of the CPU, not of the clock, so that neighbours on the machine count little: `time.thread_time` of the main
thread, which is all of the work on one thread but for the weights that load ahead.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROMPT = "a large red circle moves left on a black background"
CLASSES = {  # operators by what they are for; whatever is not named is glue
    "convolution": ("conv",),
    "norm": ("norm",),
    "attention": ("scaled_dot_product", "softmax", "bmm"),
    "linear": ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul"),
    "activation": ("silu",),
    "noise": ("aten::normal_",),
}


def generate() -> dict[str, float]:
    """Where the seconds of one `cascade generate` go, in order."""
    laps: dict[str, float] = {}

    def lap(name: str, started: float) -> None:
        laps[name] = laps.get(name, 0.0) + time.thread_time() - started

    def timed(owner: Any, name: str, label: Callable[[Any], str]) -> None:
        function = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                lap(label(args), started)

        setattr(owner, name, wrapper)

    began = time.thread_time()
    from cascade import cli

    with tempfile.TemporaryDirectory() as folder:
        (tree,) = cli.settings("generate", [f"prompt={PROMPT}", f"out={folder}/clip"])
        lap("python, settings (Hydra)", 0.0)
        for name in ("torch", "cascade.pipeline", "sentencepiece"):
            started = time.thread_time()
            __import__(name)
            lap(f"import {name}", started)
        from cascade import generate, pipeline, text
        from cascade.text import encoders

        timed(encoders, "built", lambda args: "text: load")
        timed(text.T5Text, "_tokens", lambda args: "text: encode, the load included")
        timed(pipeline, "load_stage", lambda args: f"{args[0].name}: load (beside the stage before)")
        timed(pipeline.Runner, "sample", lambda args: f"{args[1].cfg.name}: run")
        timed(pipeline, "commit_stage", lambda args: f"{args[0].name}: write")
        timed(generate, "finish", lambda args: "encode video and sheet")
        generate.verb(tree)()
    laps["all"] = time.thread_time()
    laps["before any import of ours"] = began
    return laps


def stages() -> list[tuple[Any, Any, Any]]:
    """The shipped chain's stages with their weights: config, rule, stage."""
    import torch

    from cascade import loading
    from cascade.chain import Chain, chain_settings

    chain = Chain.read(chain_settings("tiny"))
    here = torch.device("cpu")
    return [(cfg, rule, loading.load_stage(cfg, rule, here)[0]) for cfg, rule in zip(chain.stages, chain.rules)]  # noqa: B905


def given(cfg: Any, rule: Any) -> Any:
    """Any clip of the size that the stage takes, None for a stage that begins with text."""
    import torch

    from cascade.errors import ConfigError
    from cascade.video import Video

    try:
        rule.output(None, cfg)
        return None
    except ConfigError:
        takes = rule.takes(cfg)
        return Video(torch.rand(1, 3, takes.frames, takes.height, takes.width) * 2 - 1, cfg.fps / rule.rate(cfg))


def words(width: int = 128) -> Any:
    """A prompt of 12 tokens in a text of 48."""
    import torch

    from cascade.text import Text

    return Text(torch.randn(1, 48, width), torch.arange(48)[None] < 12)


def cpu(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def inside(repeats: int = 3) -> list[dict[str, Any]]:
    """Of every stage: CPU seconds of a run, and what share of its operators' time each class takes."""
    from torch.profiler import ProfilerActivity, profile

    from cascade.noise import Noise

    rows = []
    for cfg, rule, stage in stages():
        low, text, noise = given(cfg, rule), words(), Noise(0, cfg.name, ("a",))
        seconds = sorted(cpu(lambda: stage.sample(low, text, None, noise)) for _ in range(repeats + 1))  # noqa: B023
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            stage.sample(low, text, None, noise)
        spent = dict.fromkeys([*CLASSES, "glue"], 0.0)
        for event in profiler.key_averages():
            kind = next((k for k, parts in CLASSES.items() if any(p in event.key for p in parts)), "glue")
            spent[kind] += event.self_cpu_time_total
        whole = sum(spent.values())
        shares = {kind: time / whole for kind, time in spent.items()}
        rows.append({"stage": cfg.name, "seconds": seconds[repeats // 2], **shares})
    return rows


def waste(rounds: int = 7) -> list[dict[str, Any]]:
    """Of every stage, CPU seconds, medians of interleaved rounds: a run with the prompt projected once and at every
    call; two branches of guidance one after the other and in one batch."""
    import torch

    from cascade.cond import Cond
    from cascade.noise import Noise
    from cascade.text import Text

    remembering, rows = Text.remembering, []
    for cfg, rule, stage in stages():
        low, noise, text = given(cfg, rule), Noise(0, cfg.name, ("a",)), words()
        size = (1, cfg.net.channels, cfg.shape.frames, cfg.shape.height, cfg.shape.width)
        z, t, one = torch.randn(size), torch.full((1,), 0.5), torch.ones(1)
        cond = Cond(torch.randn(size), torch.ones(size)[:, :1], 0 * one, 8 * one, text).remembering()
        dropped = cond.without_text().remembering()
        both, two = Cond.cat([cond, dropped]).remembering(), torch.cat([z, z])
        w = None if cfg.w_range is None else 1.0
        times: dict[str, list[float]] = {"once": [], "each": [], "apart": [], "joint": []}

        @torch.no_grad()
        def apart() -> Any:
            return stage.denoise(z, t, cond, w), stage.denoise(z, t, dropped, w)  # noqa: B023

        @torch.no_grad()
        def joint() -> Any:
            return stage.denoise(two, torch.cat([t, t]), both, w)  # noqa: B023

        for _ in range(rounds + 1):
            times["once"].append(cpu(lambda: stage.sample(low, text, None, noise)))  # noqa: B023
            Text.remembering = lambda self: self  # type: ignore[method-assign]
            times["each"].append(cpu(lambda: stage.sample(low, text, None, noise)))  # noqa: B023
            Text.remembering = remembering  # type: ignore[method-assign]
            times["apart"].append(cpu(apart))
            times["joint"].append(cpu(joint))
        off = float((torch.cat(apart()) - joint()).abs().max())
        medians = {name: sorted(found[1:])[rounds // 2] for name, found in times.items()}
        rows.append({"stage": cfg.name, **medians, "apart by": off})
    return rows


def scaling(name: str, frames: int, side: int, window: int, steps: int = 1) -> dict[str, Any]:
    """Time and peak memory of the stage `name` at another size: `steps` calls of the network, unguided.

    Memory is what the process holds at its peak over what it held before the run, weights loaded: RSS, with its pages
    returned before (`malloc_trim`).
    """
    from cascade.noise import Noise
    from cascade.stage import Stage
    from cascade.video import Shape
    from cascade.windows import Windows

    cfg, rule, stage = next(entry for entry in stages() if entry[0].name == name)
    cfg = replace(
        cfg,
        shape=Shape(frames=frames, height=side, width=side),
        windows=Windows(frames=window, overlap=window // 4),
        sampler=replace(cfg.sampler, steps=steps, guidance=0.0, guidance_low=None),
        train=None,
    )
    stage = Stage(cfg, rule, stage.net)
    low, text = given(cfg, rule), words()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    before = memory("VmRSS")
    seconds = cpu(lambda: stage.sample(low, text, None, Noise(0, cfg.name, ("a",))))
    return {"seconds": seconds, "bytes": memory("VmHWM") - before}


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main(words: Sequence[str]) -> None:
    given: list[Any] = [int(word) if word.isdigit() else word for word in words[1:]]
    sys.stdout, out = sys.stderr, sys.stdout
    print(json.dumps({f.__name__: f for f in (generate, inside, waste, scaling)}[words[0]](*given)), file=out)


if __name__ == "__main__":
    main(sys.argv[1:])
