"""Options that several commands share, and the small forms they take: NAME=DATA, START:STOP:STEP."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from clipmerge.text import and_more, did_you_mean
from clipmerge_cli import show
from clipmerge_cli.groups import arg, opt
from clipmerge_cli.progress import progress

if TYPE_CHECKING:
    import torch

    from clipmerge.data.split import Split
    from clipmerge.device import Precision
    from clipmerge.types import Progress

INPUT, SCORING, SEARCH, OUTPUT = "Model and images", "Scoring", "Search", "Output"

HUB_FILE = "open_clip_model.safetensors"
"""What a folder's weights are called where open_clip and the Hub look for them."""


def output_path(text: str) -> Path:
    """Return the file to write: for `DIR/`, or a folder that exists, the weights file of a Hub-ready folder."""
    path = Path(text).expanduser()
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise typer.BadParameter(f"the output is safetensors: -o {path.with_suffix('.safetensors')}")
    return path / HUB_FILE if text.endswith(("/", "\\")) or path.is_dir() else path


def figure_path(text: str) -> Path:
    """Return where to draw, once it is certain that both files can be written there."""
    from clipmerge.checkpoint.output import check_target
    from clipmerge.figures.style import targets

    for file in targets(Path(text).expanduser()):
        check_target(file, force=True)
    return Path(text).expanduser()


def output_option(default: object) -> Any:
    """Declare --output, a file or the file of a Hub-ready folder."""
    text, names = "Where to write; DIR/ makes a Hub-ready folder.", ("--output", "-o")
    return opt(default, text, OUTPUT, *names, metavar="FILE", parser=output_path, show_default=False)


def scale_option(default: str) -> Any:
    """Declare --scale, a number or "auto" (None)."""
    text = "Multiplies the task vector (or their sum); auto: chosen on images."
    return opt(default, text, metavar="X", parser=scale)


def grid_option(default: str | None, text: str) -> Any:
    """Declare the coefficients to try."""
    return opt(default, text, SEARCH, metavar="GRID", parser=numbers)


Grid = Sequence[float]

BASE = arg("BASE", "The model before finetuning.")
FINETUNED = arg("FINETUNED", "The model after finetuning.")
ORIGIN = opt(None, "What FINETUNED was finetuned from; default: BASE.", None, "--base", metavar="CKPT")
UNDER = opt(None, "What adapters, encoders and task vectors stand on.", None, "--base", metavar="CKPT")
VECTORS = opt(False, "The files beside the base are task vectors, though they do not say so.", None)
CHECKPOINTS = arg("CKPT...", "Checkpoints: files, folders, hf-hub:ORG/NAME.")
DEVICE = opt("auto", "cpu, cuda, cuda:1, mps; auto: the GPU where there is one.")
FORCE = opt(False, "Overwrite an output that exists.", OUTPUT)
PLOT = opt(None, "Draw it: FILE as PNG, and as SVG beside it.", OUTPUT, metavar="FILE", parser=figure_path)
MODEL = opt(None, "An open_clip model name or JSON config; default: the checkpoint's.", INPUT, metavar="M")
TEXT_TOWER = opt(
    None,
    "What adapters and encoders without a text tower stand on.",
    INPUT,
    "--text-tower",
    "--base",
    metavar="CKPT",
)
REFINE = opt(False, "Narrow the choice down between the points of the grid.", SEARCH)
SEED = opt(0, "Seed of anything random.", SEARCH)


@dataclass(frozen=True, kw_only=True)
class Talk:
    """How a command speaks: its result on stdout, remarks and progress on stderr."""

    json: bool = opt(False, "Print one JSON document on stdout.", OUTPUT)
    quiet: bool = opt(False, "No progress, no remarks.", OUTPUT, "--quiet", "-q")

    @property
    def silent(self) -> bool:
        """Whether there are no remarks: a JSON document says it all, and one process of torchrun's speaks for all."""
        return self.quiet or self.json or not show.is_first()

    def say(self, text: str) -> None:
        """Print a remark on stderr."""
        show.say(text, quiet=self.silent)

    def progress(self, title: str | None = None) -> "AbstractContextManager[Progress | None]":
        """Show bars for long work while the block runs."""
        return progress(quiet=self.silent, title=title)

    def loading(self) -> "AbstractContextManager[Progress | None]":
        """Say, where somebody watches, that libraries are imported while the block runs: it takes seconds."""
        return self.progress("loading torch and the model …")

    def device(self, work: str, device: str, precision: str) -> "tuple[torch.device, Precision]":
        """Resolve --device and --precision, and say what the work runs on."""
        from clipmerge.device import describe, resolve_device, resolve_precision

        place = resolve_device(device)
        computing = resolve_precision(precision, place)
        self.say(f"{work} on {describe(place, computing)}")
        return place, computing


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images, and the model and prompts for them."""

    model: str | None = MODEL
    templates: list[str] | None = opt(
        None, "Prompts: openai, simple, a file or 'a photo of a {}.'; repeat.", INPUT, metavar="[NAME=]T"
    )
    classnames: list[str] | None = opt(
        None, "Class names, one per line, in label order; repeat.", INPUT, metavar="[NAME=]FILE"
    )
    limit: int | None = opt(None, "Use at most this many images.", INPUT, min=1)
    skip_bad: bool = opt(False, "Leave out images that cannot be used.", INPUT)

    def prompts(self, name: str, among: Sequence[str] = ("train", "val")) -> str | None:
        """Return the --templates that these images were given."""
        return by_data(self.templates, "--templates", among).get(name)

    def open(
        self,
        name: str,
        data: str,
        role: str | None,
        talk: Talk,
        *,
        among: Sequence[str] = ("train", "val"),
        **changes: Any,
    ) -> "Split":
        """Open labelled images with these options and `changes` to them, and say what --skip-bad left out.

        Args:
            name: what the command calls these images, by which options may be for them alone.
            among: the names of all images that it has.
        """
        from clipmerge.data.open import open_split

        templates = self.prompts(name, among)
        classnames = by_data(self.classnames, "--classnames", among).get(name)
        options = {"limit": self.limit, "skip_bad": self.skip_bad, **changes}
        split = open_split(data, role=role, classnames=classnames, templates=templates, **options)
        for remark in split.remarks:
            show.say(f"{split.source}: {remark}", quiet=talk.quiet or not show.is_first())
        if split.skipped:
            skipped = f"left out {len(split.skipped)} ({and_more(split.skipped, 1)})"
            text = f"{split.source}: {skipped}; {len(split)} images are used"
            show.say(text, quiet=talk.quiet or not show.is_first())
        return split


@dataclass(frozen=True, kw_only=True)
class Several:
    """How several coefficients are searched together."""

    method: Literal["coordinate", "random", "cmaes"] = opt(
        "coordinate", "How several coefficients are searched.", SEARCH, "--search"
    )
    budget: int = opt(60, "Models that a search may score.", SEARCH, min=1)
    seed: int = SEED


def named(values: Sequence[str], option: str, unnamed: Sequence[str] | None = None) -> dict[str, str]:
    """Return `["id=digits#val", "shift=x.npz"]` as `{"id": "digits#val", "shift": "x.npz"}`.

    Args:
        unnamed: a name for each value that is plain DATA; None: every value needs its own name.
    """
    form = "NAME=FILE, such as a=a.pt" if option == "NAME=FILE" else "NAME=DATA, such as shift=images/"
    pairs: dict[str, str] = {}
    for i, value in enumerate(values):
        name, equals, data = value.partition("=")
        if unnamed is not None and not (equals and name.isidentifier()):
            name, equals, data = unnamed[i], "=", value
        elif not equals or not name.isidentifier():
            data = ""
        if not data:
            raise typer.BadParameter(f"{value!r} is not {form}", param_hint=option)
        if name in pairs:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        pairs[name] = data
    return pairs


def listed(values: Sequence[str]) -> list[str]:
    """Return the values with the lines of FILE in place of `@FILE`, but for blank ones and those that begin with #."""
    every = list[str]()
    for value in values:
        if not value.startswith("@"):
            every.append(value)
            continue
        try:
            lines = Path(value[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise typer.BadParameter(f"the list {value[1:]} cannot be read: {reason}") from error
        every += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not every:
        raise typer.BadParameter(f"{', '.join(values)} lists nothing")
    return every


def by_data(values: Sequence[str] | None, option: str, names: Sequence[str]) -> dict[str, str]:
    """Return what each data set was given: by `VALUE`, which is for all of them, or by `NAME=VALUE`."""
    every: dict[str, str] = {}
    for value in values or ():
        name, equals, rest = value.partition("=")
        if not equals or (name not in names and not (name.isidentifier() and rest)) or Path(value).exists():
            name, rest = "", value
        elif name not in names:
            hint = did_you_mean(name, names, f"there are {', '.join(names)}")
            raise typer.BadParameter(f"no images are called {name!r}: {hint}", param_hint=option)
        if name in every:
            what = f"{name!r} is" if name else "the value for all images is"
            raise typer.BadParameter(f"{what} given twice", param_hint=option)
        every[name] = rest
    given = {name: every.get(name, every.get("")) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def numbered(name: str, count: int) -> list[str]:
    """Return `name` for one, `name1`, `name2` … for several."""
    return [name] if count == 1 else [f"{name}{i}" for i in range(1, count + 1)]


def scale(text: str) -> float | None:
    """Return `"0.4"` as `0.4` and `"auto"` as None; anything else is wrong usage."""
    if text == "auto":
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        raise typer.BadParameter(f"{text!r} is neither a number nor auto")
    return float(value)


def check_images(
    images: int, *, automatic: bool, tasks: int | None = None, how: str = "--scale auto"
) -> None:
    """Refuse --val where nothing is chosen on it, and a choice without the images that it needs.

    Args:
        images: how many times --val was given.
        tasks: how many are needed; None: at least one.
        how: the option that chooses.
    """
    if images and not automatic:
        raise typer.BadParameter("--val is for --scale auto", param_hint="--val")
    if not automatic or images == tasks or (tasks is None and images):
        return
    message = f"{how} needs held-out images: --val DATA"
    if tasks is not None:
        message = f"{how} needs one --val for each task: {tasks}, not {images}"
    raise typer.BadParameter(message, param_hint="--val")


def one_number(text: str, option: str) -> float:
    """Return `"1"` as `1.0`; anything else is wrong usage of the option."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number", param_hint=option) from error


def numbers(text: str) -> tuple[float, ...]:
    """Return `"0:1:0.25"` as `(0.0, 0.25, 0.5, 0.75, 1.0)`, exact decimals; `"0.1,0.5"` as `(0.1, 0.5)`."""
    try:
        parts = [Decimal(part) for part in text.split(":" if ":" in text else ",")]
    except InvalidOperation:
        parts = []
    if (":" in text and len(parts) != 3) or not parts or not all(part.is_finite() for part in parts):
        raise typer.BadParameter(f"{text!r} is neither START:STOP:STEP nor a list such as 0.1,0.5")
    if ":" not in text:
        return tuple(float(part) for part in parts)
    start, stop, step = parts
    if step <= 0 or stop < start or (stop - start) / step > 10_000:
        raise typer.BadParameter(f"{text!r}: the step must lead from START up to STOP")
    return tuple(float(start + step * i) for i in range(int((stop - start) / step) + 1))


SCALES = grid_option("0:1:0.05", "With auto: scales to try, as START:STOP:STEP or a list.")
