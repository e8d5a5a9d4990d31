"""Make the recipes fit a changed mlp_flax.py, before the change is committed.

    python recipes/update.py

Each diff fits the script as last committed, which Git still has. So its change can be
merged with yours. A new recipe: edit mlp_flax.py, write what the change is for and the
output of `git diff -U1 mlp_flax.py` to recipes/NAME.diff, without its line "index ...",
and restore mlp_flax.py.
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
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
    return done.stdout


def remake(recipe: Path, old_script: str) -> str:
    """Return the text of a recipe with its change moved to the present script."""
    introduction = recipe.read_text().partition("diff --git")[0]
    with TemporaryDirectory() as scratch:
        repository = Path(scratch)
        script, edited = repository / "mlp_flax.py", repository / "edited.py"
        script.write_text(old_script)
        git(repository, "init", "--quiet")
        git(repository, "apply", str(recipe))
        edited.write_text(script.read_text())

        (repository / "old.py").write_text(old_script)
        script.write_text(SCRIPT.read_text())
        git(repository, "add", "mlp_flax.py")
        git(repository, "merge-file", "mlp_flax.py", "old.py", "edited.py")
        diff = git(repository, "diff", "-U1", "mlp_flax.py")
    return introduction + re.sub(r"^index .*\n", "", diff, count=1, flags=re.MULTILINE)


def main() -> None:
    failed = False
    old_script = git(RECIPES, "show", "HEAD:./../mlp_flax.py")
    for recipe in sorted(RECIPES.glob("*.diff")):
        try:
            recipe.write_text(remake(recipe, old_script))
        except RuntimeError as error:
            print(f"{recipe.name} stays as it was: {error}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
