"""Repeat the study: `python examples/study/run.py OUT --data IMAGES`; see README.md beside this file.

Stop it when you like: the same line goes on where it was.
"""

import argparse
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from base import write_joined_base
from study import Study, column, load_setting

CHAPTERS = ("soups", "wiseft", "arithmetic", "methods", "paint", "flyp")
"""Modules beside this file, each with `run(study)`."""

DEFAULT_BASE = (
    "EfficientNet-Lite0 (ImageNet) and all-MiniLM-L6-v2, joined by a linear map and aligned on a small mixture of "
    "the sets: not a CLIP that was pretrained contrastively"
)
TEXT = (
    "Everything below was made by clipmerge's own commands, which stand under each chapter. Every choice (a learning "
    "rate, a coefficient, an ingredient, a scale) was made on held-out images; test images were looked at once, for "
    "these tables. The setting was chosen for the effects to have room, on held-out images: README.md beside the study "
    "says how many settings were looked at on the way.",
)


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for everything that is made; about 35 GB")
    parser.add_argument("--data", type=Path, default=Path(), help="where the setting's image sets lie")
    parser.add_argument(
        "--base", help="a CLIP of your own: a checkpoint, or MODEL:TAG of open_clip's; default: see base.py"
    )
    parser.add_argument("--model", help="the model of --base, where its file does not say")
    parser.add_argument(
        "--setting", type=Path, default=here / "setting.toml", help="what runs, and how much of it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="every step in a few minutes; the numbers mean nothing"
    )
    parser.add_argument("--only", nargs="+", choices=CHAPTERS, help="these chapters")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="commands side by side")
    options = parser.parse_args()

    folder, data, own = options.out.resolve(), options.data.resolve(), options.base
    if own and Path(own).exists():
        own = os.path.relpath(own, folder)
    folder.mkdir(parents=True, exist_ok=True)
    setting = load_setting(options.setting, quick=options.quick)
    os.chdir(folder)  # commands name everything as seen from here
    name = DEFAULT_BASE if own is None else f"{own}, as it is"
    link_images(folder / "images", data)
    study = Study(folder, setting, data, "base/base.safetensors", name, options.workers)
    prepare_base(study, own, options.model)
    describe(study)
    for name in options.only or CHAPTERS:
        print(name, flush=True)
        import_module(name).run(study)
    page = ["report", "chapters", "-o", "study.html", "--force", "--title", "What merging does, measured"]
    subprocess.run([sys.executable, "-m", "clipmerge", *page], cwd=folder, check=True)


def link_images(link: Path, data: Path) -> None:
    """Make `images` in the study's folder lead to where the image sets lie."""
    if link.is_symlink() and link.resolve() != data:
        link.unlink()
    if not link.exists():
        link.symlink_to(data, target_is_directory=True)


def prepare_base(study: Study, base: str | None, model: str | None) -> None:
    """Write `base/base.safetensors`: a person's own as it is, or the default one, aligned by the finetuner."""
    (study.folder / "base").mkdir(exist_ok=True)
    if base is not None:
        known = ["--model", model] if model else []
        study.run([("base/own", ["convert", base, *known, "-o", study.base])])
        return
    if not (study.folder / "base" / "model.json").is_file():
        write_joined_base(study.folder / "base")
    recipe, start = study.setting["base"], {"base": "base/joined.safetensors", "model": "base/model.json"}
    sets = recipe["shares"].items()
    images = [word for name, share in sets for word in study.images("--train", name, "train", share)]
    options = {**start, "method": "ce", "head": "frozen", "shares": "root", **recipe["options"]}
    study.run([study.finetuned("base/base", images, options, out=study.base)])


def describe(study: Study) -> None:
    """Write the first chapter: what everything starts from, and how well it does as it is."""
    sets = list(study.setting["sets"])
    data = [word for name in sets for word in study.images("--data", name, "test")]
    (scores,) = study.scores("base/test", [study.base], data).values()
    shares = study.setting["base"]["shares"]
    rows = [
        [name, study.template(name), shares.get(name, "none"), f"{scores[column(name)]:.1f}"] for name in sets
    ]
    study.write_chapter(
        0,
        "base",
        title="What everything starts from",
        text=[*TEXT, f"The base: {study.base_name}."],
        tables=[
            {
                "caption": "The base on test images, zero-shot, %",
                "columns": ["images", "prompt", "of its training images, aligned on", "accuracy"],
                "rows": rows,
                "note": f"n = {study.setting['images']['test']} test images a set.",
            }
        ],
        settings={key: str(value) for key, value in study.setting["base"].items()},
    )


if __name__ == "__main__":
    main()
