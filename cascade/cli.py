"""The command line: `cascade <verb> setting=value ...` and `python -m stages.<kind> ...`.

Settings are Hydra's, free text is not: prompts leave the arguments before Hydra sees them. Nothing heavy is imported
before the settings are known to be right.
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from cascade import __version__
from cascade.compose import compose, split_prompts
from cascade.config import fingerprint, package_root, parse, plain, suggest
from cascade.errors import CascadeError, ConfigError, HostError, MemoryLimitError
from cascade.request import Given, Prompts, bars, jobs_of, take

if TYPE_CHECKING:
    from cascade.chain import Chain
    from cascade.pipeline import Runner

HELP = """\
cascade: cascaded text-to-video, stage by stage.

  cascade generate prompt="..." [chain=tiny] [seed=0] [out=DIR] [base.sampler.steps=16 ...]
  cascade generate prompts=FILE out=DIR           one prompt a line, every stage loaded once
  cascade generate image=FILE [last=FILE]         the first frame is given, or both ends
  cascade generate extend=clip.mp4 [seconds=8]    your own video goes on
  cascade generate input=clip.mp4 mask=FILE       your own video, made anew where the mask is white
  cascade generate start=ssr1 input=clip.mp4      your own video through the rest of the chain
  cascade plan [chain=tiny] [format=json]         check a chain; sizes, parameters, work and memory of its stages
  cascade train [recipe=tiny] [jobs=1]            make the weights of a chain from nothing, every step resumable
  cascade evaluate [chain=tiny] [n=64]            judge a chain by what its videos show
  cascade report runs=DIR [out=docs]              all evaluations below DIR as one page with plots and gates
  cascade assets [only=[i3d]] [out=DIR]           fetch the networks that FVD, FID and LPIPS of the papers need
  cascade import weights=show1 source=DIR out=DIR published weights: modelscope, show1, if_image, lavie, ...
  cascade embed prompts=FILE out=DIR              write text embeddings once, for text.store=DIR
  cascade export [chain=tiny] out=DIR             a folder that diffusers and Cascade.from_pretrained load
  cascade info                                    versions, device, attention kernels
  cascade list                                    chains, whether their weights are here, and stages

  python -m stages.<kind> stage=tiny/base [task=sample|train|distill|evaluate|tune]     one stage alone
      kinds: base, tsr, ssr, interp

Settings are `key=value` (see conf/). Everywhere: --cfg job (show the settings and stop), --config-dir DIR (your own
YAML files), -m (one run for each combination of comma-separated values), --debug (tracebacks), --verbose.
"""


# verbs ---------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Generate(Given):
    start: str | None = None
    format: list[str] = field(default_factory=lambda: ["mp4"])
    fps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for suffix in self.format:
            if suffix not in ("mp4", "gif", "webm"):
                raise ValueError(f"format is {suffix!r}, expected mp4, gif or webm")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}, expected 0 to 1000")
        if self.start is not None and (self.input is None or self.mask is not None):
            raise ValueError("start and input belong together: the stage to begin with and the whole video it gets")
        if self.input is not None and self.start is None and self.mask is None:
            raise ValueError("input is set, but neither start, the stage it is for, nor mask, the hole in it")


def generate(tree: dict[str, Any]) -> None:
    """Prompt to video through a chain."""
    from cascade.chain import Device
    from cascade.given import given
    from cascade.memory import Memory, within
    from cascade.pipeline import finish

    run, on, memory = take(tree, Generate), take(tree, Device), take(tree, Memory)
    chain = chain_of(tree).since(run.start)
    texts = run.texts()
    out = Path(run.out) if run.out else Path("runs") / fingerprint(
        [plain(stage) for stage in chain.stages] + [plain(run), plain(on), plain(chain.text), memory.memory]
    )[:16]  # fmt: skip
    first = given(run, chain.stages[0], chain.rules[0])
    chain.check_weights()
    chain.runs_on(on)
    chain = within(chain, on, memory, None if first is None else first.shape)
    from cascade import store

    jobs = jobs_of(texts, run.samples, out)
    with store.lock(out), bars() as progress:
        runner = runner_of(chain, on, run, progress)
        videos = runner.run(jobs, first)
        for job in jobs:
            meta = {"seed": run.seed, "negative_prompt": run.negative_prompt, "stages": [s.name for s in chain.stages]}
            finish(job, videos[job.directory], run.format, run.fps, {**meta, "cascade": __version__})
    print(jobs[0].directory / f"video.{run.format[0]}" if len(jobs) == 1 else f"{out}: {len(jobs)} videos")


def chain_of(tree: dict[str, Any]) -> Chain:
    """The chain that the remaining settings describe; anything left over is unknown."""
    from cascade.chain import Chain

    return Chain.read(tree, [f.name for f in fields(Generate)])


def runner_of(chain: Chain, on: Any, run: Any, progress: Any) -> Runner:
    from cascade.pipeline import Runner
    from cascade.text import check_prompt, text_source

    negative = None if run.negative_prompt is None else check_prompt(run.negative_prompt)
    return Runner(chain, text_source(chain.text), on, run.seed, negative, progress)


def plan(tree: dict[str, Any]) -> None:
    """A chain checked, with the size, work and memory of its stages."""
    from cascade.plan import verb

    verb(tree)


def train(tree: dict[str, Any]) -> None:
    """All trainings that made a chain's weights."""
    from cascade.recipe import verb

    verb(tree)


def evaluate(tree: dict[str, Any]) -> None:
    """A chain judged by what its videos show."""
    from cascade.evaluate import chain_verb

    chain_verb(tree)


def assets(tree: dict[str, Any]) -> None:
    """Networks of others, for measures."""
    from cascade.assets import verb

    verb(tree)


def export(tree: dict[str, Any]) -> None:
    """A chain as a folder in diffusers' layout."""
    from cascade.export import verb

    verb(tree)


def results(tree: dict[str, Any]) -> None:
    """Evaluations collected into a page."""
    from cascade.report import verb

    verb(tree)


def import_(tree: dict[str, Any]) -> None:
    """Published weights of others."""
    from cascade.importers import verb

    verb(tree)


def embed(tree: dict[str, Any]) -> None:
    """Text embeddings of a file of prompts, written once."""
    from cascade.text import EmbeddingStore, TextConfig, encoder_of

    text = parse(tree.pop("text", {}), TextConfig, "text")
    run = take(tree, Prompts)
    texts = run.texts()
    if run.out is None:
        raise ConfigError("out is missing", fix="out=DIRECTORY")
    encoder = encoder_of(text)
    store = EmbeddingStore.create(Path(run.out), encoder)
    texts += [] if text.negative is None else [text.negative]
    print(f"{run.out}: {store.put(texts, encoder)} prompts embedded")


def info(tree: dict[str, Any]) -> None:
    """Versions, device and attention kernels."""
    import torch

    from cascade import attention

    print(f"cascade {__version__}, python {sys.version.split()[0]}, torch {torch.__version__}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"cuda: {gpu}, threads {torch.get_num_threads()}")
    q = torch.zeros(1, 1, 1, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    print(f"attention: {', '.join(attention.kernels())}; auto is {attention.select('auto', q)}")


def list_(tree: dict[str, Any]) -> None:
    """Chains, what they are and whether their weights are here; stages."""
    from cascade.chain import Chain, chain_settings

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


VERBS: dict[str, tuple[str | None, Callable[[dict[str, Any]], None]]] = {
    "generate": ("generate", generate),
    "plan": ("plan", plan),
    "train": ("train", train),
    "evaluate": ("evaluate", evaluate),
    "report": ("report", results),
    "assets": ("assets", assets),
    "import": ("import", import_),
    "embed": ("embed", embed),
    "export": ("export", export),
    "info": (None, info),
    "list": (None, list_),
}


# one stage -----------------------------------------------------------------------------------------------------------


def stage_main(kind: str) -> None:
    """Entry of `python -m stages.<kind>`."""
    run_main(sys.argv[1:], lambda argv: stage_command(kind, argv), f"python -m stages.{kind}")


def stage_command(kind: str, argv: Sequence[str]) -> None:
    from cascade import tasks

    for tree in settings("stage", argv, f"python -m stages.{kind}"):
        if tree.get("kind") != kind:
            raise ConfigError(
                f"the stage is of kind {tree.get('kind')}, this is stages.{kind}",
                fix=f"python -m stages.{tree.get('kind')}",
            )
        tasks.run(kind, tree)


# entry ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry of the `cascade` command."""
    run_main(sys.argv[1:], command, "cascade")


def command(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if argv[0] == "--version":
        print(__version__)
        return
    verb, rest = argv[0], list(argv[1:])
    if verb not in VERBS:
        raise ConfigError(f"unknown verb {verb!r}", fix=f"cascade {suggest(verb, VERBS)}")
    primary, run = VERBS[verb]
    if {"-h", "--help"} & set(rest):
        print(HELP, end="")
        return
    if primary is None:
        if rest:
            raise ConfigError(f"cascade {verb} takes no settings, not {rest[0]!r}", fix=f"cascade {verb}")
        run({})
        return
    for tree in settings(primary, rest, f"cascade {verb}"):
        run(tree)


def settings(primary: str, argv: Sequence[str], program: str = "") -> list[dict[str, Any]]:
    """The composed settings of a command, several with -m; none if they were only to be shown.

    A configuration with a key `command` is told there what was typed, see `typed`.
    """
    texts, rest = split_prompts(argv)
    config_dir, show, many, overrides = None, False, False, []
    words = iter(rest)
    for word in words:
        if word == "--cfg":
            if next(words, None) != "job":
                raise ConfigError("--cfg takes `job`", fix="--cfg job")
            show = True
        elif word == "--config-dir":
            config_dir = Path(next(words, ""))
        elif word in ("-m", "--multirun"):
            many = True
        elif word.startswith("-"):
            raise ConfigError(f"unknown option {word}", fix="cascade --help")
        else:
            overrides.append(word)
    combinations = sweep(overrides) if many else [overrides]
    trees = [{**compose(primary, combination, config_dir), **texts} for combination in combinations]
    if many:
        for number, tree in enumerate(trees):
            if tree.get("out") is not None:
                tree["out"] = str(Path(tree["out"]) / str(number))
    if show:
        import yaml  # type: ignore[import-untyped]

        print(yaml.safe_dump_all(trees, sort_keys=False, allow_unicode=True), end="")
        return []
    said = [f"{key}={text}" for key, text in texts.items()]
    options = ["--config-dir", str(config_dir)] if config_dir is not None else []
    for tree, combination in zip(trees, combinations, strict=True):
        if "command" in tree:
            tree["command"] = typed(program, [*said, *combination, *options])
    return trees


def typed(program: str, words: Sequence[str]) -> str:
    """A command line for a shell that does the same again, without `out`: where a result went is no part of it."""
    return f"{program} {shlex.join(word for word in words if not word.startswith('out='))}".strip()


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the comma-separated values, as Hydra's basic sweeper has it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"-m: {str(error).splitlines()[0]}", fix="key=a,b,c") from error
    choices = []
    for override in parsed:
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    return [list(combination) for combination in itertools.product(*choices)]


def run_main(argv: Sequence[str], body: Callable[[Sequence[str]], None], name: str) -> NoReturn:
    """Runs a command; every expected fault is one `error:` line and its exit code."""
    debug = "--debug" in argv
    verbose = "--verbose" in argv
    argv = [word for word in argv if word not in ("--debug", "--verbose")]
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("cascade").setLevel(logging.DEBUG if verbose else logging.INFO)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        body(argv)
        sys.stdout.flush()
        code = 0
    except CascadeError as error:
        code = report(error, debug)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except MemoryError as error:
        code = report(MemoryLimitError(f"out of memory {error}".strip(), "micro_batch=1, or smaller shapes"), debug)
    except OSError as error:
        if error.errno is None:
            raise
        code = report(
            HostError(f"{error.filename or name}: {error.strerror}", "free the disk or choose another out="), debug
        )
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        code = report(MemoryLimitError(str(error).splitlines()[0], "micro_batch=1, or smaller shapes"), debug)
    sys.exit(code)


def report(error: CascadeError, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return error.code


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(143)


if __name__ == "__main__":
    main()
