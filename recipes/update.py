"""Make the recipes fit a changed mlp_flax.py, before the change is committed.

    python recipes/update.py

Each diff fits the script as last committed, which Git still has, so its change can be
merged with yours. Take applied recipes back first: they would count as your change.

A new recipe: edit mlp_flax.py, write what the change is for and the output of `git diff
-U1 mlp_flax.py`, without its line "index ...", to recipes/NAME.diff, and restore
mlp_flax.py.
"""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

RECIPES = Path(__file__).resolve().parent
SCRIPT = RECIPES.with_name("mlp_flax.py")


def git(directory: Path, *arguments: str) -> str:
    """Return the output of a git command."""
    return subprocess.run(
        ["git", *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout


def remake(recipe: Path, old_script: str) -> str:
    """Return the text of a recipe, with its change made to the present script."""
    introduction = recipe.read_text().partition("diff --git")[0]
    with TemporaryDirectory() as scratch:
        directory = Path(scratch)
        script = directory / "mlp_flax.py"
        git(directory, "init", "--quiet")

        script.write_text(old_script)
        git(directory, "apply", str(recipe))
        (directory / "with_recipe.py").write_text(script.read_text())
        (directory / "old.py").write_text(old_script)

        script.write_text(SCRIPT.read_text())
        git(directory, "add", "mlp_flax.py")
        merged = git(
            directory, "merge-file", "-p", "mlp_flax.py", "old.py", "with_recipe.py"
        )
        script.write_text(merged)
        diff = git(directory, "diff", "-U1", "mlp_flax.py")
    return introduction + re.sub("^index .*\n", "", diff, count=1, flags=re.MULTILINE)


def explain(error: subprocess.CalledProcessError) -> str:
    """Return the lines at which two changes meet, or what git said."""
    conflict = re.search("<<<<<<< .*?\n>>>>>>> .*?\n", error.stdout, re.DOTALL)
    return conflict[0] if conflict else error.stderr


def main() -> None:
    failed = False
    try:
        old_script = git(SCRIPT.parent, "show", "HEAD:./mlp_flax.py")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: Git does not have the committed mlp_flax.py: {error.stderr}")
    for recipe in sorted(RECIPES.glob("*.diff")):
        try:
            recipe.write_text(remake(recipe, old_script))
        except subprocess.CalledProcessError as error:
            print(f"{recipe.name} stays as it was: {explain(error)}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
