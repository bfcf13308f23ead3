"""The Makefile hands any prompt over untouched; the lock leaves torch and its CUDA packages to the step before it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMPTS = (
    "a large red circle moves left on a black background",
    """a dog's toy, "sunset" (golden hour)""",
    "# one? 100% ${HOME} $HOME $$ $ `id` ; | & < > * ! ~ [x] {y}",
    "$(",
    "$(shell echo run) $(error stop)",
    "back\\slash \\# \\n end\\",
    "two\nlines\tand a tab ",
    "--help",
    "a=b, c:=d",
    "\u96ea and \U0001f3ac",
)


@pytest.fixture
def generate(tmp_path: Path):
    """Runs `make generate` with a stand-in for the command; returns the arguments that arrived."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    fake = tmp_path / "cascade"
    fake.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    shutil.copy(ROOT / "Makefile", tmp_path)

    def run(*settings: str, **environment: str) -> list[str]:
        # -o: the environment counts as set up. A run under `make test` must not pass its own settings on.
        command = ["make", "-s", "-o", ".venv/.ready", "generate", f"CASCADE='{sys.executable}' cascade", *settings]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS")) and k != "P"}
        done = subprocess.run(command, cwd=tmp_path, env=inherited | environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_arrives_untouched(generate, prompt):
    assert generate(f"PROMPT={prompt}") == ["generate", f"prompt={prompt}"]
    assert generate(PROMPT=prompt) == ["generate", f"prompt={prompt}"]


def test_only_leading_space_is_lost_on_the_command_line(generate):
    assert generate("PROMPT=  a kite") == ["generate", "prompt=a kite"]
    assert generate(PROMPT="  a kite") == ["generate", "prompt=  a kite"]


def test_args_are_split_by_the_shell_alone(generate):
    args = generate("ARGS=prompts=list.txt negative_prompt='grey, $(x) \"dull\"' out=a/b")
    assert args == ["generate", "prompts=list.txt", 'negative_prompt=grey, $(x) "dull"', "out=a/b"]


def test_lock_is_hashed_and_leaves_torch_out():
    lock = (ROOT / "requirements.lock").read_text()
    names = re.findall(r"^([a-z0-9._-]+)==", lock, flags=re.MULTILINE)
    assert {"numpy", "transformers", "hydra-core", "pytest"} <= set(names)
    assert not [name for name in names if re.match(r"torch$|torchvision|triton|nvidia|cuda", name)]
    assert "://" not in lock  # no registry is named: pip's own settings choose it
    for requirement in re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in requirement
