"""Recipes as users apply them: alone, in pairs, to a copy, after a change of the script.

What each recipe does is tested in the other files test_recipes_*.py.
"""

import re
import shutil
import subprocess
import sys
from itertools import permutations

import pytest
from helpers import ROOT, SMALL_LAYERS, assert_resumes, import_file

RECIPES = sorted(path.stem for path in ROOT.glob("recipes/*.diff"))
SCRIPT = (ROOT / "mlp_flax.py").read_text()
# For each recipe, those after it in the alphabet that change the same lines.
COLLISIONS = {
    "accumulate": ["weighted"],
    "adamw": ["regression"],
    "augment": ["image-folder", "regression", "scan", "seeds"],
    "best": ["devices", "image-folder", "log", "regression", "seeds"],
    "bfloat16": ["cnn", "image-folder", "nnx", "regression"],
    "cnn": ["fashion", "image-folder", "nnx", "regression", "seeds"],
    "devices": ["image-folder", "regression", "scan", "seeds"],
    "export": ["regression", "seeds"],
    "fashion": ["image-folder", "nnx", "regression", "seeds", "weighted"],
    "finetune": ["image-folder", "regression", "seeds"],
    "image-folder": ["nnx", "regression", "seeds", "weighted"],
    "nnx": ["regression"],
    "regression": ["seeds"],
    "scan": ["seeds"],
    "seeds": ["weighted"],
}


def git(directory, *arguments):
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.com", *arguments]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


def apply_by(command, directory, name):
    """Apply a recipe by a command that reads it; return whether that succeeded."""
    text = (ROOT / "recipes" / f"{name}.diff").read_bytes()
    done = subprocess.run(
        command, cwd=directory, input=text, capture_output=True, check=False
    )
    return done.returncode == 0


PATCH = ["patch", "-F0", "-p1"]
FIT_STAGE_3 = {"adamw", "best", "devices", "export", "log", "weighted"}


@pytest.fixture
def clone(tmp_path):
    """A repository with the script and the recipes, and the checkout of a user."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    shutil.copytree(ROOT / "recipes", origin / "recipes")
    for name in ("mlp_flax.py", ".gitattributes"):
        shutil.copy(ROOT / name, origin)
    git(origin, "init", "--quiet")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "first")
    git(tmp_path, "clone", "--quiet", "-c", "core.autocrlf=true", origin, clone)
    return clone


def test_pairs(tmp_path):
    """Both apply; or the second is refused, in each order and by either tool."""
    refused = {name: [] for name in RECIPES}
    script, after = tmp_path / "mlp_flax.py", {}
    for name in RECIPES:
        script.write_text(SCRIPT)
        assert apply_by(PATCH, tmp_path, name)
        after[name] = script.read_text()
    for command in (["git", "apply"], PATCH):
        for first, second in permutations(RECIPES, 2):
            script.write_text(after[first])
            if apply_by(command, tmp_path, second):
                compile(script.read_text(), f"{first} and {second}", "exec")
            else:
                refused[min(first, second)].append(max(first, second))
    expected = {name: sorted(4 * COLLISIONS.get(name, [])) for name in RECIPES}
    assert {name: sorted(others) for name, others in refused.items()} == expected


@pytest.mark.parametrize("command", [["git", "apply"], PATCH], ids=lambda c: c[0])
def test_in_a_clone(command, clone):
    """Also in one that Git was told to check out with CRLF."""
    assert apply_by(command, clone, "cnn")
    assert "class CNN" in (clone / "mlp_flax.py").read_text()


def test_in_a_project_of_ones_own(clone):
    """In a folder of another repository, where git apply would change nothing."""
    project = clone / "vision"
    project.mkdir()
    (project / "mlp_flax.py").write_text(SCRIPT)
    assert apply_by(PATCH, project, "cnn")
    assert "class CNN" in (project / "mlp_flax.py").read_text()
    assert (clone / "mlp_flax.py").read_text() == SCRIPT


def test_to_a_renamed_copy(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    assert apply_by(["patch", "-F0", "train.py"], tmp_path, "cnn")
    assert "class CNN" in (tmp_path / "train.py").read_text()


def patch_stage_3(directory, *names):
    """Apply recipes to a copy of stage 3; return whether all fit."""
    shutil.copy(ROOT / "mlp_flax_bn_dropout.py", directory / "stage_3.py")
    return all(
        apply_by(["patch", "-F0", "stage_3.py"], directory, name) for name in names
    )


def test_which_fit_stage_3(tmp_path):
    fit = {name for name in RECIPES if patch_stage_3(tmp_path, name)}
    readme = (ROOT / "README.md").read_text("utf-8")
    told = re.findall(
        r"^\| `recipes/([\w-]+)\.diff` .*\| yes \|$", readme, re.MULTILINE
    )
    assert fit == set(told) == FIT_STAGE_3


# Those that fit; but best and log, and best and devices, change the same lines.
@pytest.mark.parametrize("names", [["best"], sorted(FIT_STAGE_3 - {"best"})], ids=len)
def test_stage_3_with_recipes_learns_and_resumes(
    names, small_mnist, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert patch_stage_3(tmp_path, *names)
    script = import_file("stage_3.py", "mlp_stage_3")
    script.LAYER_SIZES = SMALL_LAYERS
    options = ["--epochs", 4, "--batch-size", 64, "--learning-rate", 0.01]
    whole = assert_resumes(script, small_mnist, *options, "--eval-every", 15)
    assert whole.accuracy > 0.4


def update(clone):
    command = [sys.executable, clone / "recipes" / "update.py"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def diffs(clone):
    return {path.stem: path.read_text() for path in clone.glob("recipes/*.diff")}


def test_update_moves_all_recipes_to_a_changed_script(clone):
    before, script = diffs(clone), clone / "mlp_flax.py"
    assert update(clone).returncode == 0
    assert diffs(clone) == before

    script.write_text(SCRIPT.replace('"""Save the state.', '"""Save a state.'))
    assert update(clone).returncode == 0
    assert diffs(clone) == before, "a docstring was edited"

    place = "\ndef save_checkpoint"
    changed = SCRIPT.replace(place, f"\n# A line more.{place}")
    script.write_text(changed)
    assert update(clone).returncode == 0
    for name in RECIPES:
        script.write_text(changed)
        assert apply_by(["git", "apply"], clone, name)
        assert "# A line more." in script.read_text()


def test_update_says_which_recipe_failed_and_where(clone):
    before, script = diffs(clone), clone / "mlp_flax.py"
    script.write_text(SCRIPT.replace("optax.adam(schedule)", "optax.sgd(schedule)"))
    done = update(clone)
    assert done.returncode == 1
    assert "adamw.diff stays as it was" in done.stderr
    assert "optax.sgd(schedule)" in done.stderr
    assert diffs(clone)["adamw"] == before["adamw"]


def test_update_outside_of_a_repository(clone):
    shutil.rmtree(clone / ".git")
    done = update(clone)
    assert done.returncode == 1
    assert "Git does not have the committed mlp_flax.py" in done.stderr
