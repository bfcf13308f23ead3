"""The design's structural laws, read from the source itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for folder in ("cascade", "stages") for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / "cascade")]
KINDS = [path for path in FILES if path.parent == ROOT / "stages" and path.stem != "__init__"]
# Imports go to the left or stay within a group.
ORDER = """
errors config compose store noise video diffusion | kernels |
foreign sampling attention text media frames clipfiles codec pickled | request | cond nets windows |
settings making stage temporal checkpoint | assets |
chain loading pipeline given data metrics planning textfit judge | ask training |
distillation evaluation importers | export arguments api bridge tasks results recipe merge generate embed about |
cli fit __main__
"""
RANK = {name: i for i, group in enumerate(ORDER.split("|")) for name in group.split()}
HOMES = {  # the files that may import a package
    "transformers": {"cascade/text/t5.py", "cascade/text/clip.py", "cascade/textfit.py", "cascade/bridge.py"},
    "xformers": {"cascade/attention/xformers.py"},
    "av": {"cascade/media/decoding.py", "cascade/media/child.py"},
    "imageio": {"cascade/media/images.py"},
    "imageio_ffmpeg": {"cascade/media/encoding.py"},
    "ffmpeg": {"cascade/media/encoding.py"},
    "accelerate": {"cascade/training/train.py", "cascade/distillation/distill.py", "cascade/tasks.py"},
    "diffusers": {"cascade/foreign.py", "cascade/bridge.py"},
    "triton": {"cascade/kernels/__init__.py"},  # and LATE
}
# Triton's language is written at the top of a module, and so are subclasses of diffusers' models: these import a heavy
# package as they load, and load inside functions alone.
LATE = {path for path in LIBRARY if path.name.endswith("_triton.py") or path.name == "bridge.py"}
HEAVY = {*HOMES, "hydra", "omegaconf", "matplotlib", "sentencepiece", "tensorboard", "torchmetrics", "tqdm"}
# Without torch.
LIGHT = tuple(f"cascade.{name}" for name in ("config", "errors", "store", "cli", "request", "assets", "media.child"))
WRITING = {"write_text", "write_bytes", "mkdir", "makedirs", "mkdtemp", "save_file", "save_pretrained", "touch"}
WRITING |= {"rename", "symlink_to", "copyfile", "copytree", "torch.save", "np.save", "os.replace", "shutil.move"}
UNPICKLING = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
RUNNING = {"torch.load", "np.load", "numpy.load", "torch.hub.load", "eval", "exec", "compile", "instantiate"}
DRAWING = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like"}
DRAWING_IN_PLACE = {"random_", "normal_", "uniform_", "bernoulli_", "exponential_"}
SEEDING = {"manual_seed", "manual_seed_all", "seed_everything", "set_seed", "set_rng_state"}


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def above(path: Path) -> dict[ast.AST, ast.AST]:
    """Every node's parent."""
    return {child: node for node in ast.walk(tree(path)) for child in ast.iter_child_nodes(node)}


def around(path: Path, node: ast.AST) -> Iterator[ast.AST]:
    while node in above(path):
        node = above(path)[node]
        yield node


def dotted(node: ast.AST) -> str:
    """`torch.nn.Linear` as it is written; a question mark for what is not a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def last(name: str) -> str:
    return name.rpartition(".")[2]


@cache
def calls() -> list[tuple[Path, ast.Call, str, str]]:
    """File, call, the called name and where it stands."""
    return [
        (path, node, dotted(node.func), f"{label(path)}:{node.lineno} {dotted(node.func)}")
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
    ]


@cache
def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Full names of what is imported when the program runs, in functions too, not for types alone."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if any(isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING" for n in around(path, node)):
            continue
        prefix = f"{'.' * node.level}{node.module}." if isinstance(node, ast.ImportFrom) else ""
        found += [(prefix + alias.name, node) for alias in node.names]
    return found


def component(name: str) -> str | None:
    """`text` for cascade.text.Text; None for what is not a module of cascade."""
    parts = name.split(".")
    return parts[1] if parts[0] == "cascade" and len(parts) > 1 and parts[1] in RANK else None


def owner(path: Path) -> str | None:
    return component(".".join(path.relative_to(ROOT).with_suffix("").parts))


# imports -------------------------------------------------------------------------------------------------------------


def test_every_module_has_its_place() -> None:
    assert [label(path) for path in LIBRARY if owner(path) is None] == ["cascade/__init__.py"]


def test_imports_go_only_to_the_left() -> None:
    wrong = []
    for path in LIBRARY:
        own = owner(path)
        for name, node in imports(path):
            other = component(name)
            if own is not None and other is not None and RANK[other] > RANK[own]:
                wrong.append(f"{label(path)}:{node.lineno} imports {name}")
    assert not wrong


def test_no_modules_need_each_other_to_be_imported() -> None:
    needs: dict[str, set[str]] = {name: set() for name in RANK}
    for path in LIBRARY:
        own = owner(path)
        for name, node in imports(path):
            other = component(name)
            if own is not None and other not in (None, own) and node in tree(path).body:
                needs[own].add(str(other))
    while free := [name for name, rest in needs.items() if not rest]:
        needs = {name: rest - set(free) for name, rest in needs.items() if name not in free}
    assert not needs


def test_cascade_never_names_a_stage_and_stages_never_each_other() -> None:
    wrong = []
    for path in FILES:
        for name, node in imports(path):
            first = name.split(".")[0]
            foreign = path in KINDS and first not in {"torch", "cascade", *sys.stdlib_module_names}
            if first == "stages" or not first or foreign:  # not first: a relative import
                wrong.append(f"{label(path)}:{node.lineno} imports {name}")
    assert KINDS and not wrong


def test_heavy_packages_have_their_own_modules_and_load_inside_functions() -> None:
    wrong = []
    for path in FILES:
        for name, node in imports(path):
            package = name.split(".")[0]
            home = (
                label(path) in HOMES.get(package, {label(path)}) or path in LATE or "cascade/importers/" in label(path)
            )
            early = node in tree(path).body and path not in LATE
            if package in HEAVY and (early or not home):
                wrong.append(f"{label(path)}:{node.lineno} imports {name}")
            if node in tree(path).body and ("_triton" in name or "bridge" in name) and path not in LATE:
                wrong.append(f"{label(path)}:{node.lineno} imports {name}")
    assert not wrong


@pytest.mark.parametrize("path", KINDS, ids=label)
def test_a_stages_main_only_calls_the_command_line(path: Path) -> None:
    end = tree(path).body[-1]
    assert isinstance(end, ast.If) and ast.unparse(end.test) == "__name__ == '__main__'"
    lines = ["from cascade.cli import stage_main", f"stage_main({path.stem!r})"]
    assert [ast.unparse(node) for node in end.body] == lines


# nothing happens at import -------------------------------------------------------------------------------------------


def test_modules_only_define() -> None:
    """What their definitions call is watched below."""
    legal = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    wrong = []
    for path in FILES:
        for node in tree(path).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            docstring |= (
                isinstance(node, ast.Expr) and last(dotted(getattr(node.value, "func", node))) == "register_autograd"
            )
            guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            if not (isinstance(node, legal) or docstring or guard):
                wrong.append(f"{label(path)}:{node.lineno}")
    assert not wrong


IMPORT_ALL = """
import importlib, os, sys
light, everything = sys.argv[1].split(","), sys.argv[2].split(",")
for name in light:
    importlib.import_module(name)
assert "torch" not in sys.modules, "a light module imports torch"
import torch, torch.utils.checkpoint, torch.utils.data, numpy.random
state, seen = torch.get_rng_state(), []
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
acting = ("os.mkdir", "os.rename", "os.remove", "os.fork", "os.system", "subprocess.Popen", "socket.connect")
def watch(event, args):
    if event == "open" and (set(str(args[1] or "")) & set("wax+") or args[2] & writing) or event in acting:
        seen.append(f"{event} {args[:1]}")
class Watched(type(os.environ)):
    def __getitem__(self, key):
        caller = sys._getframe(1)
        while caller.f_globals["__name__"] in ("os", "collections.abc", "_collections_abc"):
            caller = caller.f_back
        if caller.f_globals["__name__"].startswith(("cascade", "stages")):
            seen.append(f"reads {key} from the environment")
        return super().__getitem__(key)
os.environ.__class__ = Watched
sys.addaudithook(watch)
for name in everything:
    importlib.import_module(name)
assert not seen, seen
assert torch.equal(state, torch.get_rng_state()), "an import draws random numbers"
assert not torch.cuda.is_initialized(), "an import starts CUDA"
heavy = set(sys.argv[3].split(",")) & set(sys.modules)
assert not heavy, heavy
print("clean")
"""


def test_importing_everything_touches_nothing(tmp_path: Path) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path not in LATE
    ]
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(LIGHT), ",".join(names), ",".join(HEAVY - {"tqdm"})]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.stdout.strip() == "clean", done.stderr
    assert not list(tmp_path.iterdir())


# what no module does -------------------------------------------------------------------------------------------------


def test_no_refusal_leaves_out_what_mends_it() -> None:
    names = {node.name for node in tree(ROOT / "cascade/errors.py").body if isinstance(node, ast.ClassDef)}
    refusals = [(call, where) for _, call, name, where in calls() if last(name) in names]
    assert refusals and not [
        where for call, where in refusals if len(call.args) < 2 and "fix" not in [word.arg for word in call.keywords]
    ]


def opens_for_writing(call: ast.Call) -> bool:
    text = ast.unparse(call)
    flags = any(flag in text for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND")) and "os.devnull" not in text
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [part.value for part in given if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return flags or any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes)


def test_only_the_store_writes() -> None:
    """Besides it TensorBoard writes its own files (training/train.py), and ffmpeg into what `store` hands out."""
    wrong = []
    for path, call, name, where in calls():
        writes = last(name) in WRITING or name in WRITING or (last(name) == "open" and opens_for_writing(call))
        if writes and owner(path) != "store":
            wrong.append(where)
    assert not wrong


def test_nothing_read_can_run() -> None:
    wrong = [where for _, _, name, where in calls() if name in RUNNING]
    for path in FILES:
        wrong += [f"{label(path)}: {name}" for name, _ in imports(path) if name.split(".")[0] in UNPICKLING]
    assert not wrong


def test_no_stage_is_treated_by_the_name_of_its_kind() -> None:
    kinds, wrong = {path.stem for path in KINDS}, []
    for path in LIBRARY:
        for node in ast.walk(tree(path)):
            parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            parts += [node.subject] if isinstance(node, ast.Match) else []
            asked = any(last(dotted(part)) == "kind" for part in parts)
            texts = {leaf.value for part in parts for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)}
            if asked and (texts & kinds or isinstance(node, ast.Match)):
                wrong.append(f"{label(path)}:{node.lineno}")  # type: ignore[attr-defined]
    assert not wrong


def test_nothing_is_drawn_from_global_randomness() -> None:
    """Initial weights are, as torch.nn does it: `tasks.new_stage` seeds them inside fork_rng."""
    wrong = []
    for path, call, name, where in calls():
        told = any(keyword.arg == "generator" for keyword in call.keywords)
        weight = any(isinstance(n, ast.Call) and dotted(n.func) == "nn.Parameter" for n in around(path, call))
        drawn = (name.startswith("torch.") and last(name) in DRAWING and not weight) or last(name) in DRAWING_IN_PLACE
        initial = ".init." in name
        numpy = name.startswith(("np.random.", "numpy.random.")) and last(name) not in ("default_rng", "Generator")
        if (drawn and not told and not initial) or numpy or name.startswith("random."):
            wrong.append(where)
    assert not wrong


def test_the_global_generator_is_seeded_inside_fork_rng_alone() -> None:
    wrong = []
    for path, call, name, where in calls():
        if last(name) in SEEDING and "Generator" not in ast.unparse(call.func):
            withs = [node for node in around(path, call) if isinstance(node, ast.With)]
            if not any("fork_rng" in ast.unparse(item) for node in withs for item in node.items):
                wrong.append(where)
    assert not wrong


def test_no_error_is_swallowed_and_no_weights_load_loosely() -> None:
    wrong = [
        where
        for _, call, name, where in calls()
        if last(name) == "load_state_dict" and any(keyword.arg == "strict" for keyword in call.keywords)
    ]
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                if broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                    wrong.append(f"{label(path)}:{node.lineno}")
    assert not wrong


def test_every_module_says_what_it_is_and_owes_nothing() -> None:
    texts = {path: path.read_text() for path in FILES}
    assert [label(path) for path, text in texts.items() if text.strip() and not ast.get_docstring(tree(path))] == []
    assert [label(path) for path, text in texts.items() for word in ("TODO", "FIXME", "XXX") if word in text] == []
