"""Every fenced bash and python block of the README is run, in order, in one folder of a user's files.

The block that installs is what `.ci/run` does on a fresh environment; here it is only checked that it does.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from clipmerge_cli.app import COMMANDS, main
from clipmerge_cli.demo import verdicts
from clipmerge_cli.demo_steps import MODEL

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
INSTALL = ("pip install . && clipmerge demo\n", "pip install -e '.[dev]' && pytest\n")


@pytest.fixture(scope="module")
def world(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: base, ckpts/, two tasks' checkpoints, and images in class folders.

    The files are plain ones, which say nothing about themselves; ViT-B-32 stands for the demo's small model.
    """
    root = tmp_path_factory.mktemp("world")
    (root / "ckpts").mkdir()
    (root / "small.json").write_text(json.dumps(MODEL))
    tasks = {"base": "base", "tasks/low": "cars", "tasks/high": "signs"}
    singles = {
        f"ft/{path.stem}": f"ckpts/{path.stem}"
        for path in sorted((demo_folder / "ft").glob("*.safetensors"))[:3]
    }
    for source, name in {**tasks, **singles}.items():
        save_file(load_file(demo_folder / f"{source}.safetensors"), root / f"{name}.safetensors")
    for data, folder in (
        ("digits#train", "images/train"),
        ("digits#val", "images/val"),
        ("digits#test", "images/test"),
        ("digits#val@rotate:25", "sketches/val"),
        ("digits#val@blur:1.5", "cars/val"),
    ):
        write_folder(data, root / folder)
    return root


def write_folder(data: str, folder: Path) -> None:
    from clipmerge.data.open import open_split

    split = open_split(data, limit=120)
    for i, label in enumerate(split.labels):
        place = folder / split.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        split.image(i).save(place / f"{i}.png")


def small(block: str) -> str:
    return block.replace("ViT-B-32", "small.json")


def commands(block: str) -> Iterator[list[str]]:
    """The command lines of a block, as a shell reads them; globs are expanded where the test stands."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "clipmerge", line
            yield [
                w
                for word in words[1:]
                for w in (globbed(word) if "*" in word and " " not in word else [word])
            ]


def globbed(pattern: str) -> list[str]:
    found = sorted(map(str, Path().glob(pattern)))
    assert found, pattern
    return found


def test_every_block_says_what_it_is() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


def test_what_installs_is_what_continuous_integration_does() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(("bash", line) in BLOCKS for line in INSTALL)
    assert "-m clipmerge demo" in script
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert """/pip" install --quiet -e '.[dev]'""" in script
    assert "-m pytest" in script
    assert "pip install -e '.[dev]'" in contributing


def test_what_is_said_of_the_picture_is_what_its_numbers_say() -> None:
    """demo.json holds the tests of the run that drew demo.png."""
    results = json.loads((ROOT / "examples" / "demo.json").read_text(encoding="utf-8"))
    sentences = verdicts(results)
    assert len(sentences) == 4
    assert re.findall(r"^- (.*: on test digits .*)$", README, re.MULTILINE) == sentences


def test_every_block_runs_in_order(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    names: dict[str, Any] = {"__name__": "readme"}
    for language, block in BLOCKS:
        if language == "python":
            exec(
                compile(small(block), "README.md", "exec"), names
            )  # the blocks share names, as a reader would
        elif block not in INSTALL:
            for words in commands(small(block)):
                assert main(words) == 0, (words, capsys.readouterr().err)
    written = {path.name for path in world.glob("*.safetensors")}
    assert {"soup.safetensors", "wise.safetensors", "both.safetensors", "halfway.safetensors"} <= written
    assert (world / "curve.svg").exists()


def test_the_table_names_commands_that_exist() -> None:
    table = README.partition("## Methods")[2].partition("\n\nLinear")[0]
    named = {cell.split()[0] for cell in re.findall(r"`([a-z][a-z -]*?)[`…]", table)}
    assert named <= set(COMMANDS)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_picture_is_small() -> None:
    assert (ROOT / "examples" / "demo.png").stat().st_size < 200_000
