"""README.md and README.zh-CN.md: what they tell people to type or to open is real."""

import importlib.util
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, SCRIPTS, draw, load, run
from PIL import Image

import common

PAGES = ["README.md", "README.zh-CN.md"]
STAGES = dict(
    zip(["stage 1", "stage 2", "stage 3"], SCRIPTS), **{"common.py": "common"}
)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks():
    return re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    text = read(page)
    names = re.findall(r"(?:[\w./-]+/)?[\w.-]+\.(?:py|diff|md|txt|png)\b", text)
    names += re.findall(r"\]\((?!http|#)([^)]+)\)", text)
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert f"\n## {anchor.replace('-', ' ')}\n" in text.lower()
    missing = {name for name in names if not (ROOT / name).exists()}
    assert missing <= {"digit.png"}
    other_page = PAGES[1 - PAGES.index(page)]
    assert f"({other_page})" in text.splitlines()[0]


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page):
    words = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", read(page)))
    options = set(
        re.findall(r"--[a-z-]+", load("mlp_flax").make_parser().format_help())
    )
    tools = {"--no-project", "--with-requirements"}  # of uv
    assert words <= options | tools
    if page == "README.md":
        assert options - {"--help"} <= words


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_is_named(page):
    named = set(re.findall(r"recipes/([\w-]+)\.diff", read(page)))
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.diff")}


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_article_exist(page):
    """In a cell such as "stage 1: `one_hot`, `loss`", with either kind of colon."""
    cells = re.findall(
        r"(stage \d|`common\.py`)(?:: |：)((?:`\w+`(?:, |、)?)+)", read(page)
    )
    assert len(cells) >= 4
    for file, names in cells:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(load(STAGES[file.strip("`")]), name), name


def test_own_project(tmp_path, monkeypatch):
    """The block and the table of its section, with the images that it describes."""
    text = (ROOT / "mlp_flax.py").read_text()
    definitions, _ = python_blocks()
    place = "def create_train_state("
    text = text.replace(place, f"{definitions}\n\n{place}")
    section = read("README.md").partition("## Start your own project")[2]
    table = re.findall(
        r"^\| `(.+)` \| `(.+)` \|$", section.partition("\n## ")[0], re.MULTILINE
    )
    assert len(table) == 3
    for old, new in table:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "mine.py").write_text(text)

    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=1000)
    images = rng.integers(128, size=(1000, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels):
        row, column = divmod(label, 2)  # a quarter of the image is greener
        image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16, 1] += 60
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("mine", "mine.py")
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    options = ["--epochs", 2, "--checkpoint", "mine.msgpack"]
    result = run(mine, "unused", *options)
    assert result.lines[0] == "data: my images, 800 training and 200 test images"
    assert result.accuracy > 0.8
    assert "resuming after step 50" in run(mine, "unused", *options).lines


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_predict(name, whole_run, small_mnist, tmp_path, monkeypatch, capsys):
    script = load(name)
    result = whole_run(script)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_mnist, "data")
    shutil.copy(result.options[result.options.index("--checkpoint") + 1], "run.msgpack")
    images, labels = draw(300, seed=3)
    Image.fromarray(images[7]).resize((56, 56)).convert("RGB").save("digit.png")

    _, program = python_blocks()
    if name == SCRIPTS[2]:  # the README says what to change
        program = program.replace("from mlp_flax import", f"from {name} import")
        program = program.replace(
            '"params": state["params"]}, x',
            '"params": state["params"], "batch_stats": state["batch_stats"]}, x, train=False',
        )
    exec(program, {})  # noqa: S102
    x = common.FlattenAndCast()(images[[7, 0]])
    guesses = script.apply_model(result.state, x).tolist()
    printed = capsys.readouterr().out
    assert printed == f"picture: {guesses[0]}\na {labels[0]}: {guesses[1]}\n"
