"""The command line: `cascade <verb> setting=value ...` and `python -m stages.<kind> ...`.

Settings are Hydra's, free text is not: prompts leave the arguments before Hydra sees them. Nothing heavy is imported
before the settings are known to be right.
"""

from __future__ import annotations

import copy
import errno
import io
import itertools
import logging
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cascade import __version__
from cascade.compose import compose, split_prompts
from cascade.config import package_root, suggest
from cascade.errors import CascadeError, ConfigError, HostError, MemoryLimitError

HELP = """\
cascade: cascaded text-to-video, stage by stage.

  cascade generate prompt="..." [chain=tiny] [seed=0] [out=DIR] [base.sampler.steps=16 ...]
  cascade generate prompts=FILE out=DIR           one prompt a line, every stage loaded once
  cascade generate image=FILE [last=FILE]         the first frame is given, or both ends
  cascade generate extend=clip.mp4 [seconds=8]    your own video, continued
  cascade generate input=clip.mp4 mask=FILE       your own video, repainted where the mask is white
  cascade generate start=ssr1 input=clip.mp4      your own video through the rest of the chain
  cascade plan [chain=tiny] [format=json]         check a chain; sizes, parameters, work and memory of its stages
  cascade train [recipe=tiny] [jobs=1]            make the weights of a chain from nothing, every step resumable
  cascade evaluate [chain=tiny] [n=64]            judge a chain by what its videos show
  cascade report runs=DIR [kept=FILE] [out=docs]  one page of all evaluations below DIR, and of those in a results.json
  cascade assets [only=[i3d]] [out=DIR]           fetch the networks that FVD, FID and LPIPS of the papers need
  cascade import weights=show1 source=DIR out=DIR published weights: modelscope, show1, if_image, lavie, ...
  cascade embed prompts=FILE out=DIR              write text embeddings once, for text.store=DIR
  cascade export [chain=tiny] out=DIR             a folder that diffusers and Cascade.from_pretrained load
  cascade info                                    versions, device, attention kernels
  cascade list                                    chains, whether their weights are here, and stages

  python -m stages.<kind> stage=tiny/base [task=sample|train|distill|evaluate|tune]     one stage alone
      kinds: base, tsr, ssr, interp, relay, refine

Settings are `key=value`; `cascade VERB --help` says what they are. Everywhere: --cfg job (show the settings and stop),
--config-dir DIR (your own YAML files), -m (one run for each combination of comma-separated values), --debug
(tracebacks), --verbose.
"""


Verb = Callable[[dict[str, Any]], Callable[[], None]]  # checks settings, and returns what does the work
MOST_RUNS = 10_000  # of one command with -m

VERBS: dict[str, tuple[str | None, str]] = {  # the YAML in conf/ that its settings start from, and what it does
    "generate": ("generate", "cascade.generate.verb"),
    "plan": ("plan", "cascade.planning.plan.verb"),
    "train": ("train", "cascade.recipe.verb"),
    "evaluate": ("evaluate", "cascade.evaluation.evaluate.chain_verb"),
    "report": ("report", "cascade.results.report.verb"),
    "assets": ("assets", "cascade.assets.verb"),
    "import": ("import", "cascade.importers.verb"),
    "embed": ("embed", "cascade.embed.verb"),
    "export": ("export", "cascade.export.verb"),
    "info": (None, "cascade.about.info"),
    "list": (None, "cascade.about.list_"),
}


# one stage -----------------------------------------------------------------------------------------------------------


def stage_main(kind: str) -> None:
    """Entry of `python -m stages.<kind>`."""
    run_main(sys.argv[1:], lambda argv: stage_command(kind, argv), f"python -m stages.{kind}")


def stage_command(kind: str, argv: Sequence[str]) -> None:
    """The command on one stage that `argv` says."""
    from cascade import tasks

    if {"-h", "--help"} & set(argv):
        print(help_of("python -m stages", "stage"), end="")
        return
    trees = settings("stage", argv, f"python -m stages.{kind}")
    for tree in trees:
        if tree.get("kind") != kind:
            raise ConfigError(
                f"the stage is of kind {tree.get('kind')}, this is stages.{kind}",
                fix=f"python -m stages.{tree.get('kind')}",
            )
    carry_out(partial(tasks.task, kind), trees)


# entry ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry of the `cascade` command."""
    run_main(sys.argv[1:], command, "cascade")


def command(argv: Sequence[str]) -> None:
    """The `cascade` command that `argv` says."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if argv[0] == "--version":
        print(__version__)
        return
    verb, rest = argv[0], list(argv[1:])
    if verb not in VERBS:
        raise ConfigError(f"unknown verb {verb!r}", fix=f"cascade {suggest(verb, VERBS)}")
    primary, name = VERBS[verb]
    if {"-h", "--help"} & set(rest):
        print(help_of(f"cascade {verb}", primary), end="")
        return
    if primary is None:
        if rest:
            raise ConfigError(f"cascade {verb} takes no settings, not {rest[0]!r}", fix=f"cascade {verb}")
        function(name)()
        return
    carry_out(function(name), settings(primary, rest, f"cascade {verb}"))


def carry_out(verb: Verb, trees: Sequence[dict[str, Any]]) -> None:
    """With -m the last combination is checked before the first one runs; what a check has read is not kept for it."""
    for tree in trees[1:]:
        verb(copy.deepcopy(tree))
    for tree in trees:
        verb(tree)()


def help_of(verb: str, primary: str | None) -> str:
    """The lines of HELP about one verb, and the file of its settings, whose comments say what they are."""
    lines = re.findall(rf"(?m)^  {re.escape(verb)}\b.*\n(?: {{6}}.*\n)*", HELP)
    if primary is not None:
        lines += ["\n", (package_root() / "conf" / f"{primary}.yaml").read_text()]
    return "".join([*lines, "\n", HELP[HELP.index("Settings are") :]])


def function(name: str) -> Callable[..., Any]:
    """What VERBS names, its module imported only now."""
    module, _, attribute = name.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(module), attribute)
    return found


def settings(primary: str, argv: Sequence[str], program: str = "") -> list[dict[str, Any]]:
    """The composed settings of a command, several with -m; none if they were only to be shown.

    A configuration with a key `command` is told there what was typed, see `typed`, one with `config_dir` that folder.
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
            if (folder := next(words, None)) is None:
                raise ConfigError("--config-dir takes a folder", fix="--config-dir DIR")
            config_dir = Path(folder)
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
            if isinstance(tree.get("out"), str) and tree["out"]:  # another one is refused
                tree["out"] = str(Path(tree["out"]) / str(number))
    if show:
        import yaml  # type: ignore[import-untyped]

        print(yaml.safe_dump_all(trees, sort_keys=False, allow_unicode=True), end="")
        return []
    said = [f"{key}={text}" for key, text in texts.items()]
    options = ["--config-dir", str(config_dir)] if config_dir is not None else []
    for tree, combination in zip(trees, combinations, strict=True):
        if "config_dir" in tree and config_dir is not None:
            tree["config_dir"] = str(config_dir.resolve())
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

    parser, choices = OverridesParser.create(), []
    for word in overrides:
        try:
            override = parser.parse_override(word)
            key, several = override.get_key_element(), override.is_sweep_override()
            values = itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1) if several else ()
            choices.append([f"{key}={value}" for value in values] if several else [str(override.input_line)])
        except HydraException as error:
            raise ConfigError(f"-m: {word!r} is not key=a,b,c as Hydra reads it", fix="key=a,b,c") from error
    if math.prod(map(len, choices)) > MOST_RUNS:
        raise ConfigError(f"-m: more than {MOST_RUNS} combinations", fix="fewer values")
    return [list(combination) for combination in itertools.product(*choices)]


def run_main(argv: Sequence[str], body: Callable[[Sequence[str]], None], name: str) -> NoReturn:
    """Runs a command; every expected fault is one `error:` line and its exit code."""
    debug = "--debug" in argv
    verbose = "--verbose" in argv
    argv = [word for word in argv if word not in ("--debug", "--verbose")]
    _open_streams()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("cascade").setLevel(logging.DEBUG if verbose else logging.INFO)
    with Ending(debug, name) as ending:
        body(argv)
        sys.stdout.flush()
    sys.exit(ending.code)


class Ending:
    """How a command ends: with the exit code of a signal, or of what went wrong and its line on stderr.

    SIGINT and SIGTERM end it, again and again where a library swallows what they raise, as some do while they are
    imported. What runs because of it, such as the deletion of a temporary file, is interrupted only by a further one.
    What nobody expected is raised.
    """

    code = 0

    def __init__(self, debug: bool, name: str) -> None:
        self.debug, self.name = debug, name

    def __enter__(self) -> Ending:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.hear) for number in heard}
        return self

    def hear(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            self.code = 128 + number
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        if number != signal.SIGALRM or not _unwinding(sys.exc_info()[1]):
            raise KeyboardInterrupt if self.code == 130 else SystemExit(self.code)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            if handler is not None:  # one that is not Python's
                signal.signal(number, handler)
        if error is not None and not self.code:
            self.code = verdict(error, self.debug, self.name)
        return self.code != 0 or isinstance(error, BrokenPipeError)


def _unwinding(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, KeyboardInterrupt | SystemExit) or _unwinding(error.__context__))


def verdict(error: BaseException, debug: bool, name: str) -> int:
    """The exit code of what ended a command, after its line on stderr; 0: there is none for it."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, MemoryError):
        error = MemoryLimitError(f"out of memory {error}".strip(), "micro_batch=1, or smaller shapes")
    elif isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free the disk or choose another out=" if full else "another file, or the right to read or write this one"
        error = HostError(f"{error.filename or name}: {error.strerror}", fix)
    elif isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error)):
        error = MemoryLimitError(str(error).splitlines()[0], "micro_batch=1, or smaller shapes")
    return report(error, debug) if isinstance(error, CascadeError) else 0


def _open_streams() -> None:
    """A stream that the caller closed leads nowhere; a terminal shows what it has no sign for as an escape."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def report(error: CascadeError, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return error.code


if __name__ == "__main__":
    main()
