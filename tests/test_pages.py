"""README.md and README.zh-CN.md: what they tell people to type or to open is real."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import STAGE_1, STAGE_2, STAGE_3, draw, run
from PIL import Image

import common

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "README.zh-CN.md"]
README, CHINESE = (ROOT.joinpath(page).read_text(encoding="utf-8") for page in PAGES)
DEFINITIONS, PREDICT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
both = pytest.mark.parametrize("text", [README, CHINESE], ids=PAGES)


@both
def test_files_and_links_exist(text):
    names = re.findall(r"(?:[\w./-]+/)?[\w.-]+\.(?:py|diff|md|txt|png)\b", text)
    names += re.findall(r"\]\((?!http|#)([^)]+)\)", text)
    assert {name for name in names if not (ROOT / name).exists()} <= {"digit.png"}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert f"\n## {anchor.replace('-', ' ')}\n" in text.lower()
    recipes = {path.stem for path in ROOT.glob("recipes/*.diff")}
    assert set(re.findall(r"recipes/([\w-]+)\.diff", text)) == recipes


@both
def test_options_exist(text):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    options = set(re.findall(r"--[a-z-]+", STAGE_2.make_parser().format_help()))
    of_uv = {"--no-project", "--with-requirements"}
    assert named <= options | of_uv
    if text is README:
        assert options - {"--help"} <= named


@both
def test_names_of_the_article_exist(text):
    """In a cell such as "stage 1: `one_hot`, `loss`", with either kind of colon."""
    files = {"1": STAGE_1, "2": STAGE_2, "3": STAGE_3, "`common.py`": common}
    cell = r"(?:stage (\d)|(`common\.py`))(?:: |：)((?:`\w+`(?:, |、)?)+)"
    cells = re.findall(cell, text)
    assert len(cells) >= 4
    for stage, other, names in cells:
        for name in re.findall(r"\w+", names):
            assert hasattr(files[stage or other], name), name


def test_own_project(tmp_path, monkeypatch):
    """The block and the table of its section, with the images that it describes."""
    text = Path(STAGE_2.__file__).read_text()
    place = "def create_train_state("
    text = text.replace(place, f"{DEFINITIONS}\n\n{place}")
    section = README.partition("## Start your own project")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `(.+)` \| `(.+)` \|$", section, re.MULTILINE)
    assert len(table) == 3
    for old, new in table:
        assert text.count(old) == 1
        text = text.replace(old, new)

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=1000)
    images = rng.integers(128, size=(1000, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels):
        row, column = divmod(label, 2)  # a quarter of the image is greener
        image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16, 1] += 60
    np.save("images.npy", images)
    np.save("labels.npy", labels)
    Path("mine.py").write_text(text)
    spec = importlib.util.spec_from_file_location("mlp_mine", "mine.py")
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    result = run(mine, "unused", "--epochs", 2)
    assert result.lines[0] == "data: my images, 800 training and 200 test images"
    assert result.accuracy > 0.8


def test_predict(
    flax_script, whole_run, checkpoints, small_mnist, tmp_path, monkeypatch, capsys
):
    state, name = whole_run(flax_script).state, flax_script.__name__
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_mnist, "data")
    shutil.copy(checkpoints / name, "run.msgpack")
    images, labels = draw(300, seed=3)
    picture = Image.fromarray(images[7]).resize((56, 56))
    picture.convert("RGB").save("digit.png")

    program = PREDICT
    if flax_script is STAGE_3:  # the README says what to change
        program = program.replace("from mlp_flax import", f"from {name} import")
        params = '"params": state["params"]}, x'
        with_stats = '"params": state["params"], "batch_stats": state["batch_stats"]}'
        program = program.replace(params, f"{with_stats}, x, train=False")
    exec(program, {})  # noqa: S102
    seen = np.stack([picture.resize((28, 28)), images[0]])
    guesses = flax_script.apply_model(state, common.FlattenAndCast()(seen))
    expected = f"picture: {guesses[0]}\na {labels[0]}: {guesses[1]}\n"
    assert capsys.readouterr().out == expected
