"""Remake the diffs after a change of mlp_flax.py: python recipes/update.py

The "index" line of a diff names the version of the script that it was made for. Git still
has that version, so its change can be merged into the script as it is now.

A new recipe: edit mlp_flax.py, write what it is for and the output of `git diff` to
recipes/NAME.diff, restore mlp_flax.py, and run this.
"""

import re
import subprocess
import sys
from difflib import unified_diff
from pathlib import Path
from tempfile import TemporaryDirectory

RECIPES = Path(__file__).resolve().parent
ROOT = RECIPES.parent


def git(*arguments: str | Path, directory: Path = ROOT) -> str:
    """Return the output of a git command."""
    command = ["git", *map(str, arguments)]
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, encoding="utf-8"
    ).stdout


def remake(text: str) -> str:
    """Return a recipe with its change moved to the present script."""
    introduction = text.partition("diff --git")[0]
    script = re.search(r"^--- a/(.+)$", text, re.MULTILINE)[1]
    old_version = re.search(r"^index (\w+)", text, re.MULTILINE)[1]
    current = ROOT / script

    with TemporaryDirectory() as directory:
        old, edited = Path(directory, "old.py"), Path(directory, script)
        recipe = Path(directory, "recipe.diff")
        old.write_text(git("cat-file", "blob", old_version), encoding="utf-8")
        edited.write_text(old.read_text(encoding="utf-8"), encoding="utf-8")
        recipe.write_text(text, encoding="utf-8")
        git("apply", recipe, directory=Path(directory))
        merged = git("merge-file", "-p", current, old, edited)
        edited.write_text(merged, encoding="utf-8")
        new_version = git("hash-object", edited)[:10]

    lines = unified_diff(
        current.read_text(encoding="utf-8").splitlines(keepends=True),
        merged.splitlines(keepends=True),
        f"a/{script}",
        f"b/{script}",
        n=1,
    )
    version = git("hash-object", "-w", current)[:10]  # -w: git can find it next time
    head = f"diff --git a/{script} b/{script}\nindex {version}..{new_version} 100644\n"
    return introduction + head + "".join(lines)


def main() -> None:
    failed = False
    for path in sorted(RECIPES.glob("*.diff")):
        try:
            path.write_text(remake(path.read_text(encoding="utf-8")), encoding="utf-8")
        except subprocess.CalledProcessError as error:
            print(
                f"{path.name}: {' '.join(error.cmd)}: {error.stderr}", file=sys.stderr
            )
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
