"""A cascade of paper size on a GPU, stage by stage with random weights: time, share of the matmul ceiling, memory.

    python benchmarks/gpu.py --predict             writes what is expected into gpu.yaml: before the first run
    python benchmarks/gpu.py --prepare FILE        settings, plan and predictions as JSON, on any machine
    python benchmarks/gpu.py FILE --out DIR        on the GPU: DIR/gpu.json and DIR/gpu.md, written after every row,
                                                   and DIR/gpu.log, a line for each thing that is known
    python benchmarks/gpu.py --dry [FILE]          in miniature on the CPU; what compiles only if --parts names it

The run needs torch, triton, numpy, safetensors, this tree and FILE. Stages are run with our kernels first, then again
in every way there is. Each takes its turn in each round, and so does the product of two large matrices: the ceiling.
A peer or a way that is not there says why. Frames are halved where the whole clip does not fit. Weights are random:
times hold, pictures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_cascade as on_gpu
import peer_models
import torch
from gpu_cascade import Entry, Norming, Rates, Size
from measure import REFUSALS, Run, why
from torch import Tensor

from cascade import attention
from cascade.config import parse, plain
from cascade.nets.compiled import Compile, compiled
from cascade.planning import count

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / "gpu.yaml"
PARTS = ("stages", "ways", "sampling", "peers", "compiled", "regional")
EAGER = ("ours", "torch", "xformers", "float32 weights")
PROCESSES = 12  # that compile norms ahead of the first stage
LONG = 500.0  # ms: what takes longer runs in three rounds at most
NORMAL = 1e-8  # seconds for a number of a step's noise, which is drawn on the CPU: 6e-9 and its way to the GPU


@dataclass(kw_only=True)
class Prepared:
    """All that a run needs to know."""

    chain: str
    tokens: int  # of the prompt
    rates: Rates
    side: int
    rounds: int
    stages: list[Entry]
    work: dict[str, int]  # of peers
    networks: dict[str, dict[str, Any]]
    compiled: list[str]  # of the networks, those that are also compiled
    norms: list[Norming]  # of all stages


# before the run ------------------------------------------------------------------------------------------------------


def settings(path: Path = SETTINGS) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def composed(asked: dict[str, Any], dry: bool) -> Any:
    """The chain, in miniature if `dry`."""
    from cascade.chain import Chain, chain_settings

    if not dry:
        return Chain.read(chain_settings(asked["chain"]))
    small = asked["dry"]
    names = chain_settings(asked["chain"])["stages"]
    tree = chain_settings(
        asked["chain"], [*small["words"], *(f"{name}.{word}" for name in names for word in small["each"])]
    )
    for name in names:
        levels = tree[name]["net"]["levels"][-small["levels"]["count"] :]  # the deep ones attend
        tree[name]["net"]["levels"] = [{**x, "channels": small["levels"]["channels"], "blocks": 1} for x in levels]
    return Chain.read(tree)


def predict() -> None:
    """Writes the table of predictions at the end of gpu.yaml."""
    import yaml

    asked = settings()
    chain, rates = composed(asked, dry=False), parse(asked["rates"], Rates)
    table = {}
    for cfg, rule in zip(chain.stages, chain.rules, strict=True):
        found = on_gpu.roofline(cfg, rule, chain.text.max_tokens, rates)
        table[cfg.name] = {
            "tflop": round(found.flops / 1e12, 2),
            "ms": float(f"{1e3 * found.seconds:.3g}"),
            "percent": round(100 * found.flops / found.seconds / rates.ceiling),
            "gb": round(on_gpu.peak(cfg, rule, chain.text.max_tokens) / 1e9, 2),
            "why": found.why(),
        }
    kept = SETTINGS.read_text(encoding="utf-8").partition("predicted:")[0]
    text = yaml.safe_dump({"predicted": table}, sort_keys=False, default_flow_style=None, width=120)
    SETTINGS.write_text(kept + text, encoding="utf-8")


def prepare(dry: bool) -> Prepared:
    """What a machine without Hydra and YAML needs; predictions as they stand in gpu.yaml."""
    asked, known = settings(), settings(HERE / "peers.yaml")
    rates = parse(asked["rates"], Rates)
    peers = {**asked["peers"], **(asked["dry"]["peers"] if dry else {})}
    frames, height, width = peers["shape"]
    text = {"tokens": known["text"]["tokens"], "text": known["text"]["width"]}
    chain = composed(asked, dry)
    stages, norms = [], set()
    for cfg, rule in zip(chain.stages, chain.rules, strict=True):
        ms = None if dry else asked["predicted"][cfg.name]["ms"]
        stages.append(entry(replace(cfg, train=None), rule, chain.text.max_tokens, rates, ms))
        norms |= on_gpu.normings(cfg, rule, chain.text.max_tokens)
    return Prepared(
        chain=asked["chain"],
        tokens=chain.text.max_tokens,
        rates=rates,
        side=asked["dry"]["side"] if dry else asked["side"],
        rounds=asked["dry"]["rounds"] if dry else asked["rounds"],
        stages=stages,
        work={"frames": frames, "height": height, "width": width, **text},
        networks={name: known["networks"][name][peers["size"]] for name in peers["networks"]},
        compiled=peers["compiled"],
        norms=sorted(norms),
    )


def entry(cfg: Any, rule: Any, tokens: int, rates: Rates, ms: float | None) -> Entry:
    """A stage with the sizes that may be tried; `ms` is predicted for the whole one (None: by the roofline here)."""
    sizes: list[Size] = []
    for smaller in on_gpu.smaller(cfg, rule):
        params, flops = count.work(smaller, rule, tokens)
        if ms is None:
            ms = 1e3 * on_gpu.roofline(smaller, rule, tokens, rates).seconds
        scaled = ms * flops / sizes[0].flops if sizes else ms
        sizes.append(
            Size(frames=smaller.shape.frames, flops=flops, peak_bytes=on_gpu.peak(smaller, rule, tokens), ms=scaled)
        )
    calls = cfg.sampler.evaluations(guided=cfg.w_range is None)
    return Entry(settings=plain(cfg), params=params, evaluations=calls, sizes=sizes)


# the run -------------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """What is known so far; every change goes to `out`."""

    prepared: Prepared
    out: Path | None
    about: dict[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ordered(self) -> dict[str, dict[str, Any]]:
        """The stages in the chain's order."""
        names = [stage.settings["name"] for stage in self.prepared.stages]
        return {name: self.stages[name] for name in names if name in self.stages}

    def save(self) -> None:
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        data = {"about": self.about, "clip": clip(self), "stages": self.ordered(), "peers": self.peers}
        (self.out / "gpu.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (self.out / "gpu.md").write_text(tables(self), encoding="utf-8")


def compile_ahead(run: Run, file: Path) -> None:
    """Every norm of every stage, in processes side by side, which leave them in Triton's cache."""
    command = [sys.executable, __file__, str(file), "--ahead"]
    started = [subprocess.Popen([*command, f"{i}/{PROCESSES}"]) for i in range(PROCESSES)]
    codes = []
    for process in started:
        try:
            codes.append(process.wait(max(1.0, 60 - run.now)))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(-1)
    run.say("compiled ahead", processes=len(codes), failed=sum(code != 0 for code in codes))


def stages(run: Run, results: Results) -> None:
    """Every stage with our kernels, the longest first: most of a clip is its last stage."""
    for stage in sorted(results.prepared.stages, key=lambda stage: -stage.sizes[0].flops):
        name, size = stage.settings["name"], stage.sizes[0]
        need = 5 + 2e-3 * size.ms * (turns(results.prepared, size) + 2)
        late = run.late(name, 0 if run.dry else need)
        results.stages[name] = {"skipped": "out of time"} if late else largest(run, results.prepared, stage)
        run.say(name, **results.stages[name])
        results.save()


def timed(results: Results, names: Collection[str] | None) -> list[tuple[Entry, str, dict[str, Any]]]:
    """The stages (`names`: of those) that ours was timed at, the shortest first, with their names and results."""
    found = [(stage, str(stage.settings["name"])) for stage in results.prepared.stages]
    found.sort(key=lambda pair: pair[0].sizes[0].flops)
    rows = [(stage, name, results.stages.get(name, {})) for stage, name in found if names is None or name in names]
    return [(stage, name, row) for stage, name, row in rows if "ours" in row.get("ms", {})]


def other_ways(run: Run, results: Results, names: Collection[str] | None = None) -> None:
    """Every stage (`names`: of those) again, the longest first, in all ways that there are beside ours."""
    for stage, name, row in reversed(timed(results, names)):
        size = next(size for size in stage.sizes if size.frames == row["frames"])
        need = 8 + 1.2e-3 * row["ms"]["ours"][0] * (turns(results.prepared, size) + 2) * len(EAGER)
        if run.late(f"{name}, other ways", 0 if run.dry else need):
            row["refused"] |= {"other ways": "out of time"}
            continue
        on_gpu.free()
        try:
            found = measured(run, results.prepared, stage, size, [*EAGER, "graph"])
        except REFUSALS as error:
            row["refused"] |= {"other ways": why(error)}
        else:
            found["refused"] = row["refused"] | found["refused"]
            results.stages[name] = found if "ours" in found["ms"] else {**row, "refused": found["refused"]}
        run.say(f"{name}, other ways", **results.stages[name])
        results.save()


def samplings(run: Run, results: Results, names: Collection[str] | None = None) -> None:
    """A whole sampling run of every stage (`names`: of those) as the chain makes it, the shortest first."""
    for stage, name, row in timed(results, names):
        cfg, rule = stage.read(row["frames"])
        draws = cfg.net.channels * cfg.shape.frames * cfg.shape.height * cfg.shape.width
        need = 4 + stage.evaluations * (1.5e-3 * row["ms"]["ours"][0] + NORMAL * draws)
        if run.late(f"{name}, sampling", 0 if run.dry else need):
            row["sampled"] = {"refused": "out of time"}
            continue
        on_gpu.free()
        tokens = results.prepared.tokens
        row["sampled"] = attempt(
            lambda: on_gpu.sampled(on_gpu.build(cfg, rule, run.device, torch.bfloat16), tokens, run.device)  # noqa: B023
        )
        run.say(f"{name}, sampling", **row["sampled"])
        results.save()


def turns(prepared: Prepared, size: Size) -> int:
    """Rounds in which the ways to run a stage take their turns."""
    return prepared.rounds if size.ms < LONG else min(3, prepared.rounds)


def largest(run: Run, prepared: Prepared, stage: Entry) -> dict[str, Any]:
    """The stage at the largest size that fits and works; why the larger ones do not stands among what was refused."""
    found: dict[str, Any] = {"ms": {}, "refused": {}}
    tried: dict[str, str] = {}
    for size in stage.sizes:
        on_gpu.free()
        room = float("inf") if run.dry else 0.95 * torch.cuda.mem_get_info()[0]
        if size.peak_bytes > room:
            tried[f"{size.frames} frames"] = f"needs {size.peak_bytes / 1e9:.1f} GB of {room / 1e9:.1f}"
            continue
        try:
            found = measured(run, prepared, stage, size, ["ours"])
        except REFUSALS as error:  # not even its weights fit
            tried[f"{size.frames} frames"] = why(error)
            continue
        if "ours" in found["ms"]:
            break
        tried[f"{size.frames} frames"] = found["refused"]["ours"]
    found["refused"] |= tried
    return found


def measured(run: Run, prepared: Prepared, stage: Entry, size: Size, launches: list[str]) -> dict[str, Any]:
    """Ways to run a stage at one size, in interleaved rounds."""
    cfg, rule = stage.read(size.frames)
    graph = not run.dry and 2 * size.peak_bytes < 0.95 * torch.cuda.mem_get_info()[0]  # its memory is its own
    shipped = on_gpu.build(cfg, rule, run.device)
    good, refused = on_gpu.works(
        on_gpu.ways(shipped, prepared.tokens, run.device, [x for x in launches if graph or x != "graph"])
    )
    if "graph" in launches and not graph:
        refused["graph"] = "it is for CUDA" if run.dry else "no room for its own memory"
    kernels: list[str] = []
    if "ours" in good:
        with attention.record() as kernels:
            good["ours"]()
    ceiling = on_gpu.squares(run.device, prepared.side)
    ceiling()
    taken = on_gpu.summary(on_gpu.rounds(run, {"ceiling": ceiling, **good}, turns(prepared, size), 5))
    good.clear()
    on_gpu.free()
    row: dict[str, Any] = {"frames": size.frames, "whole": stage.sizes[0].frames, "params": stage.params}
    row |= {"flops": size.flops, "predicted_ms": size.ms, "predicted_bytes": size.peak_bytes}
    row |= {"ceiling": 2e3 * prepared.side**3 / taken.pop("ceiling")[0], "ms": taken, "refused": refused}
    row["attention"] = sorted(set(kernels))
    return row


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except REFUSALS as error:
        return {"refused": why(error)}


def regional(run: Run, results: Results, compiling: float) -> None:
    """Stages compiled block by block beside themselves, the most expensive first: what compiles may not get ready."""
    for stage in sorted(results.prepared.stages, key=lambda stage: -stage.sizes[0].flops):
        name = stage.settings["name"]
        row = results.stages.get(name, {})
        if "ours" not in row.get("ms", {}) or run.late(f"{name} regional", compiling):
            continue
        row["beside_regional"], refused = beside(run, results.prepared, stage, row["frames"])
        row["refused"] |= refused
        run.say(f"{name} regional", **row["beside_regional"], refused=refused)
        results.save()
        on_gpu.free()


def beside(run: Run, prepared: Prepared, stage: Entry, frames: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times of a stage compiled and not, and why there are none."""
    torch.compiler.reset()  # the limit on what one function compiles to counts all stages together
    shipped = on_gpu.build(*stage.read(frames), run.device)
    good, refused = on_gpu.works(on_gpu.ways(shipped, prepared.tokens, run.device, ["ours", "regional"]))
    return on_gpu.summary(on_gpu.rounds(run, good, prepared.rounds)), refused


def peers(run: Run, results: Results, ways: tuple[str, ...], names: list[str], compiling: float = 0.0) -> None:
    """Ours and others' networks at equal size and work, weights in float32 under autocast to bfloat16."""
    torch.compiler.reset()
    prepared = results.prepared
    calls: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    work = peer_models.Work(**prepared.work)
    x = work.clip().to(run.device)
    for package in names:
        shape = prepared.networks[package]
        row = results.peers.setdefault(package, {"ms": {}, "refused": {}})
        for way in ways:
            if run.late(f"{package} {way}", compiling if way == "compiled" and not run.dry else 0):
                row["refused"][way] = "out of time"
                continue
            call = on_gpu.deferred(lambda p=package, s=shape, w=way: peer(run, p, s, work, w, x, results))  # type: ignore[misc]
            good, bad = on_gpu.works({f"{package} {way}": call})
            calls |= good
            refused |= bad
    ceiling = on_gpu.squares(run.device, prepared.side)
    ceiling()
    taken = on_gpu.summary(on_gpu.rounds(run, {"ceiling": ceiling, **calls}, prepared.rounds))
    top = 2e3 * prepared.side**3 / taken.pop("ceiling")[0]
    for found, key in ((taken, "ms"), (refused, "refused")):
        for name, value in found.items():
            package, _, way = name.partition(" ")
            results.peers[package][key][way] = value
    for package in names:
        results.peers[package].setdefault("ceiling", top)
        run.say(package, **results.peers[package])
    results.save()


def peer(
    run: Run, package: str, shape: dict[str, Any], work: peer_models.Work, way: str, x: Tensor, results: Results
) -> Callable[[], Tensor]:
    """One evaluation of `package`'s network; what it counts goes to the results."""
    with run.device:
        net, call = peer_models.build(package, shape, work.on(run.device))
    net.requires_grad_(False)
    ours, row = package == "cascade", results.peers[package]
    if "flops" not in row:
        from peer_child import counted

        row["params"] = sum(p.numel() for p in net.parameters())
        row["flops"] = sum(on_gpu.within(lambda: counted(call, x), run.device, "torch")()[1].values())
    if way == "xformers" and not ours:
        if not hasattr(net, "enable_xformers_memory_efficient_attention"):
            raise ValueError("it has no such setting")
        net.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
    if way == "compiled" and ours:
        compiled(net, Compile.REGIONAL, "eager" if run.dry else "inductor")
    elif way == "compiled":
        net.compile(backend="eager" if run.dry else "inductor")
    return on_gpu.within(lambda: call(x), run.device, "ours", "xformers" if way == "xformers" and ours else None)


# what it says --------------------------------------------------------------------------------------------------------


def fastest(row: dict[str, Any]) -> tuple[float, str]:
    """Milliseconds of the fastest way to run a stage, and its name."""
    known = {name: each[0] for name, each in row["ms"].items()}
    if "regional" in row.get("beside_regional", {}):
        known["regional"] = row["beside_regional"]["regional"][0]
    return min((ms, name) for name, ms in known.items())


def clip(results: Results) -> dict[str, Any]:
    """The clip's seconds: every stage's evaluations, each as the fastest way takes for the whole clip.

    A stage that was measured with fewer frames counts as its FLOPs do. `missing`: the stages without a time.
    """
    seconds = predicted = work = ceiling = 0.0
    missing, fewer, calls = [], [], 0
    for stage in results.prepared.stages:
        name, whole = stage.settings["name"], stage.sizes[0]
        row = results.stages.get(name, {})
        if not row.get("ms"):
            missing.append(name)
            continue
        fewer += [name] if row["frames"] < whole.frames else []
        each = fastest(row)[0] * whole.flops / row["flops"]
        calls += stage.evaluations
        seconds += 1e-3 * stage.evaluations * each
        predicted += 1e-3 * stage.evaluations * whole.ms
        work += stage.evaluations * whole.flops
        ceiling += 1e-3 * stage.evaluations * each * row["ceiling"]
    runs = [
        results.stages.get(s.settings["name"], {}).get("sampled", {}).get("seconds") for s in results.prepared.stages
    ]
    return {
        "seconds": seconds,
        "predicted": predicted,
        "evaluations": calls,
        "of_ceiling": work / ceiling if ceiling else 0.0,
        "sampled": None if fewer or None in runs else sum(runs),
        "missing": missing,
        "fewer_frames": fewer,
    }


def tables(results: Results) -> str:
    """Markdown: the headline, the stages, the peers, and why something is not there."""
    whole, about = clip(results), results.about
    head = f"**{whole['seconds']:.3g} s a clip** for {whole['evaluations']} evaluations"
    head += f" (predicted: {whole['predicted']:.3g} s), {100 * whole['of_ceiling']:.0f} % of the matmul ceiling."
    if whole["sampled"] is not None:
        head += f" Sampling runs as the chain makes them, noise drawn on the CPU: {whole['sampled']:.3g} s."
    head += f" Without {', '.join(whole['missing'])}." if whole["missing"] else ""
    head += f" With fewer frames, scaled by FLOPs: {', '.join(whole['fewer_frames'])}." if whole["fewer_frames"] else ""
    said = f"{results.prepared.chain} on {about['device']}, torch {about['torch']}; random weights, batch 1"
    said += f"; predicted for {results.prepared.rates.device}."
    parts = [said, head, stage_table(results), peer_table(results), *reasons(results)]
    return "\n\n".join(parts) + "\n"


WAYS = (*EAGER, "graph")
STAGE_HEAD = (
    "stage", "frames", "TFLOP", "predicted ms", "fastest ms", "way", "predicted / measured", "predicted of ceiling",
    "of ceiling", *(f"{way} ms" for way in WAYS), "regional (ours beside it) ms", "predicted GB", "allocator GB",
    "sampling s",
)  # fmt: skip


def stage_table(results: Results) -> str:
    lines = [STAGE_HEAD, ("---",) * len(STAGE_HEAD)]
    for stage in results.prepared.stages:
        row = results.stages.get(stage.settings["name"], {})
        if not row.get("ms"):
            continue
        ms, way = fastest(row)
        beside = row.get("beside_regional", {})
        pair = f"{beside['regional'][0]:.3g} ({beside['ours'][0]:.3g})" if {"ours", "regional"} <= set(beside) else ""
        ran, speed = row.get("sampled", {}), row["flops"] / row["ceiling"]
        allocated = f"{ran['peak_bytes'] / 1e9:.3g}" if "peak_bytes" in ran else ""
        frames = f"{row['frames']}" if row["frames"] == row["whole"] else f"{row['frames']} of {row['whole']}"
        ceiling = 1e3 * row["flops"] / row["predicted_ms"] / results.prepared.rates.ceiling
        lines.append(
            (
                stage.settings["name"], frames, f"{row['flops'] / 1e12:.3g}", f"{row['predicted_ms']:.3g}",
                f"{ms:.3g}", way, f"{row['predicted_ms'] / ms:.2f}", f"{100 * ceiling:.0f} %",
                f"{1e5 * speed / ms:.0f} %", *(cell(row["ms"].get(way)) for way in WAYS), pair,
                f"{row['predicted_bytes'] / 1e9:.3g}", allocated, f"{ran['seconds']:.3g}" if "seconds" in ran else "",
            )
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PEER_HEAD = (
    "network", "M parameters", "GFLOP", "eager ms", "of ceiling", "xformers ms", "compiled ms", "ours per FLOP",
)  # fmt: skip


def peer_table(results: Results) -> str:
    """The last column: our speed per FLOP over the peer's, both eager."""
    lines = [PEER_HEAD, ("---",) * len(PEER_HEAD)]
    ours = results.peers.get("cascade", {})
    for name, row in results.peers.items():
        if "eager" not in row["ms"]:
            continue
        eager, ratio = row["ms"]["eager"][0], ""
        if name != "cascade" and "eager" in ours.get("ms", {}):
            ratio = f"{ours['flops'] / ours['ms']['eager'][0] * eager / row['flops']:.2f}"
        share = f"{1e5 * row['flops'] / eager / row['ceiling']:.0f} %"
        other = (cell(row["ms"].get(way)) for way in ("xformers", "compiled"))
        lines.append(
            (
                name, f"{row['params'] / 1e6:.1f}", f"{row['flops'] / 1e9:.1f}", cell(row["ms"]["eager"]), share,
                *other, ratio,
            )
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(times: list[float] | None) -> str:
    """Median (least to greatest)."""
    return "" if times is None else f"{times[0]:.3g} ({times[1]:.3g} to {times[2]:.3g})"


def reasons(results: Results) -> list[str]:
    """Why something has no number, a line for each reason."""
    found: dict[str, list[str]] = {}
    for name, row in (*results.stages.items(), *results.peers.items()):
        why = {**row.get("refused", {}), **({"stage": row["skipped"]} if "skipped" in row else {})}
        why |= {"sampling": row["sampled"]["refused"]} if "refused" in row.get("sampled", {}) else {}
        for way, reason in why.items():
            found.setdefault(reason, []).append(f"{name} {way}")
    return ["\n".join(f"- {', '.join(names)}: {reason}" for reason, names in found.items())] if found else []


def measure(run: Run, results: Results, parts: list[str], compiling: float) -> None:
    """What matters most first; what compiles last."""
    torch.set_float32_matmul_precision("high")
    if "stages" in parts:
        stages(run, results)
    if "ways" in parts:
        other_ways(run, results)
    if "sampling" in parts:
        samplings(run, results)
    if "peers" in parts:
        peers(run, results, ("eager", "xformers"), list(results.prepared.networks))
    if "compiled" in parts:
        peers(run, results, ("compiled",), results.prepared.compiled, compiling)
    if "regional" in parts:
        regional(run, results, compiling)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("prepared", type=Path, nargs="?", metavar="FILE", help="as --prepare wrote it")
    ask.add_argument("--prepare", type=Path, metavar="FILE")
    ask.add_argument("--predict", action="store_true")
    ask.add_argument("--dry", action="store_true", help="in miniature on the CPU")
    ask.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    ask.add_argument("--compiling", type=float, default=100.0, help="seconds that compiling a network may take")
    ask.add_argument("--parts", help=f"of {','.join(PARTS)}")
    ask.add_argument("--ahead", help=argparse.SUPPRESS)
    ask.add_argument("--out", type=Path, metavar="DIR")
    given = ask.parse_args()
    if given.predict:
        predict()
        return 0
    if given.prepare is not None:
        given.prepare.write_text(json.dumps(plain(prepare(given.dry)), indent=1) + "\n", encoding="utf-8")
        return 0
    parts = given.parts.split(",") if given.parts else list(PARTS[:4] if given.dry else PARTS)
    if unknown := set(parts) - set(PARTS):
        ask.error(f"--parts: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    if not given.dry and not torch.cuda.is_available():
        ask.error("there is no CUDA device: --dry runs in miniature on the CPU")
    if given.prepared is None and not given.dry:
        ask.error("FILE is missing: write it with --prepare FILE")
    began = time.time()
    prepared = prepare(True) if given.prepared is None else parse(json.loads(given.prepared.read_bytes()), Prepared)
    if given.ahead is not None:
        i, n = given.ahead.split("/")
        on_gpu.compile_norms(prepared.norms[int(i) :: int(n)], torch.device("cuda"))
        return 0
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given.dry, given.budget, began, None, None if given.out is None else given.out / "gpu.log")
    device = "CPU" if given.dry else torch.cuda.get_device_name()
    results = Results(prepared, given.out, {"device": device, "torch": torch.__version__})
    if not given.dry and "stages" in parts:
        compile_ahead(run, given.prepared)
    measure(run, results, parts, given.compiling)
    results.save()
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
