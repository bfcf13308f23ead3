"""What the README says of the files is true."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def named_files() -> set[str]:
    """The files that the README's tree names, as paths from the root."""
    block = next(part for part in README.split("```") if part.lstrip().startswith("cascade/ "))
    found, folders = set(), {-1: ""}
    for line in block.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        words = line.split()
        if words[0].endswith("/"):
            folders[depth] = folders[depth - 1] + words[0]
            names = [word for word in words[1:] if re.fullmatch(r"[\w.-]+\.(py|yaml|md),?", word)]
            found |= {folders[depth] + name.rstrip(",") for name in names}
        else:
            found |= {folders[depth - 1] + word for word in words if re.fullmatch(r"[\w./]+\.(py|yaml)", word)}
    return found


def test_the_tree_equals_the_files() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("cascade", "stages", "conf")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml") and path.name != "__init__.py"
    }
    files |= {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert named_files() == files


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_commands_of_the_readme_are_commands() -> None:
    from cascade.cli import VERBS
    from cascade.tasks import TASKS

    assert set(re.findall(r"(?m)(?:^|\s{4})cascade ([a-z]+)", README)) <= set(VERBS)
    assert set(re.findall(r"task=([a-z]+)", README)) <= set(TASKS)
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    assert set(re.findall(r"(?m)^make ([a-z-]+)", README)) <= set(targets)
