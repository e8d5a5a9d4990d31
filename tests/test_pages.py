"""README.md and README.zh-CN.md: their snippets run, and what they name exists."""

import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, STAGE_2, import_file, run

import common

TEXTS = {
    page: (ROOT / page).read_text("utf-8") for page in ("README.md", "README.zh-CN.md")
}
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{i}")
    for page, text in TEXTS.items()
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    if "def load_data" not in snippet  # which belongs into a script, see below
]
pages = pytest.mark.parametrize("page", TEXTS)


@pages
def test_files_options_and_recipes_exist(page):
    text = TEXTS[page]
    names = re.findall(r"(?:[\w./-]+/)?[\w.-]+\.(?:py|diff|md|txt|png)\b", text)
    names += re.findall(r"\]\((?!http|#)([^)]+)\)", text)
    mine = {"train.py", "path/to/recipes/cnn.diff", "recipes/NAME.diff"}
    assert {name for name in names if not (ROOT / name).exists()} <= mine
    anchors = re.findall(r"\]\(#([^)]+)\)", text)
    headings = [line.lower().replace(" ", "-") for line in text.splitlines()]
    assert set(anchors) <= {line.removeprefix("##-") for line in headings}

    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    others = {"--no-project", "--with-requirements", "--xla"}  # of uv, of XLA
    ours = re.findall(r"--[a-z][a-z-]+", Path(STAGE_2.__file__).read_text())
    assert options <= {*ours, "--help", *others}


@pages
def test_own_project(page, tmp_path, monkeypatch):
    """The definitions and the replacements of the page, with the data it describes."""
    definitions = re.findall(r"```python\n(class CNN.*?)```", TEXTS[page], re.DOTALL)
    after = TEXTS[page].partition("def load_data")[2].partition("\n## ")[0]
    replacements = re.findall(r"^\| `(.+)` \| `(.+)` \|$", after, re.MULTILINE)
    assert len(definitions) == 1 and replacements
    script = Path(STAGE_2.__file__).read_text()
    for old, new in replacements:
        assert script.count(old) == 1
        script = script.replace(old, new)
    place = "def create_train_state("
    script = script.replace(place, f"{definitions[0]}\n\n{place}")

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=1000)
    images = rng.integers(128, size=(1000, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(label, 2)  # a quarter of the image is greener
        image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16, 1] += 60
    np.save("images.npy", images)
    np.save("labels.npy", labels)
    Path("mine.py").write_text(script)
    result = run(import_file("mine.py", "mlp_mine"), "unused", "--epochs", 2)
    assert result.lines[0].startswith("run: my images, 800 training images")
    assert result.accuracy > 0.8


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(
    snippet, whole_run, checkpoints, small_mnist, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(STAGE_2, "DATA_DIR", small_mnist)
    shutil.copytree(small_mnist, "data")
    state = whole_run(STAGE_2).state
    shutil.copy(checkpoints / STAGE_2.__name__, "run.msgpack")
    Path("snippet.py").write_text(snippet)
    runpy.run_path("snippet.py")
    if "run.msgpack" in snippet:
        images, _ = common.numpy_collate(common.load_mnist("data")[1][:8])
        assert str(STAGE_2.apply_model(state, images)) in capsys.readouterr().out
