"""Options that several commands share, and the small forms they take: NAME=DATA, START:STOP:STEP."""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Literal

import typer

_INPUT, _SCORING = "Model and images", "Scoring"
_OUTPUT = "Output"

HUB_FILE = "open_clip_model.safetensors"
"""What a folder's weights are called where open_clip and the Hub look for them."""


def _output(text: str) -> Path:
    """`DIR/`, or a folder that exists, is the weights file of a Hub-ready folder."""
    path = Path(text).expanduser()
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise typer.BadParameter(f"what is written is safetensors: -o {path.with_suffix('.safetensors')}")
    return path / HUB_FILE if text.endswith(("/", "\\")) or path.is_dir() else path


Checkpoints = Annotated[
    list[str],
    typer.Argument(
        help="Checkpoints: files, folders, hf-hub:ORG/NAME.", metavar="CKPT...", show_default=False
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", parser=_output, show_default=False,
                 help="Where to write; DIR/ makes a Hub-ready folder.", rich_help_panel=_OUTPUT),
]  # fmt: skip
MaybeOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", parser=_output, show_default=False,
                 help="Where to write; DIR/ makes a Hub-ready folder.", rich_help_panel=_OUTPUT),
]  # fmt: skip
Force = Annotated[
    bool, typer.Option("--force", help="Overwrite an output that exists.", rich_help_panel=_OUTPUT)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=_OUTPUT)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no remarks.", rich_help_panel=_OUTPUT)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check and show the plan; write nothing.", rich_help_panel=_OUTPUT)
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="fp32, fp16 or bf16; default: the first input's.",
                 rich_help_panel=_OUTPUT),
]  # fmt: skip
ShardSize = Annotated[
    str | None,
    typer.Option("--shard-size", metavar="SIZE", help="Write shards of at most this, e.g. 5GB.",
                 rich_help_panel=_OUTPUT),
]  # fmt: skip
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Let NaN and infinity through.", rich_help_panel=_OUTPUT)
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of the merge.", rich_help_panel=_OUTPUT)
]
NoDigests = Annotated[
    bool,
    typer.Option("--no-digests", help="Do not digest the parents; `verify` will not find them.",
                 rich_help_panel=_OUTPUT),
]  # fmt: skip
Fsync = Annotated[
    bool,
    typer.Option("--fsync", help="Return when the output is on the disk, not in its cache.",
                 rich_help_panel=_OUTPUT),
]  # fmt: skip
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="ORG/NAME", help="Upload the folder written with -o DIR/.",
                 show_default=False, rich_help_panel=_OUTPUT),
]  # fmt: skip

Model = Annotated[
    str | None,
    typer.Option("--model", metavar="M", rich_help_panel=_INPUT, show_default=False,
                 help="An open_clip model name or JSON config; default: what the checkpoint says."),
]  # fmt: skip
Templates = Annotated[
    str | None,
    typer.Option("--templates", metavar="T", rich_help_panel=_INPUT,
                 help="Prompts: openai, simple, a file, or text such as 'a photo of a {}.'"),
]  # fmt: skip
Classnames = Annotated[
    Path | None,
    typer.Option("--classnames", metavar="FILE", help="Class names, one a line, in the order of the labels.",
                 rich_help_panel=_INPUT),
]  # fmt: skip
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out images that cannot be used.", rich_help_panel=_INPUT)
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Use at most this many images.", rich_help_panel=_INPUT)
]

Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.", rich_help_panel=_SCORING)]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16"],
    typer.Option("--precision", metavar="P", help="fp32, or bf16 / fp16 autocast.", rich_help_panel=_SCORING),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images at once.", rich_help_panel=_SCORING)
]
Metric = Annotated[
    Literal["top1", "top5", "mean_per_class", "macro_f1", "worst_group", "ece"],
    typer.Option("--metric", metavar="M", rich_help_panel=_SCORING,
                 help="What decides: top1, top5, mean_per_class, macro_f1, worst_group or ece."),
]  # fmt: skip


def named(values: Sequence[str], option: str) -> dict[str, str]:
    """`["id=digits#val", "shift=x.npz"]` → `{"id": "digits#val", "shift": "x.npz"}`; wrong form: exit 2."""
    form = f"{option}, such as a=a.pt" if option == "NAME=FILE" else "NAME=DATA, such as shift=images/"
    found: dict[str, str] = {}
    for value in values:
        name, equals, data = value.partition("=")
        if not equals or not name.isidentifier() or not data:
            raise typer.BadParameter(f"{value!r} is not {form}", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        found[name] = data
    return found


def scale_of(text: str) -> float:
    """`"0.4"` → `0.4`; anything but one finite number: exit 2."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        raise typer.BadParameter(f"{text!r} is neither a number nor auto", param_hint="--scale")
    return float(value)


def numbers(text: str, option: str) -> tuple[float, ...]:
    """`"0:1:0.25"` → `(0.0, 0.25, 0.5, 0.75, 1.0)`, exact decimals; `"0.1,0.5"` → `(0.1, 0.5)`."""
    try:
        parts = [Decimal(part) for part in text.split(":" if ":" in text else ",")]
    except InvalidOperation:
        parts = []
    if (":" in text and len(parts) != 3) or not parts or not all(part.is_finite() for part in parts):
        raise typer.BadParameter(
            f"{text!r} is neither START:STOP:STEP nor a list such as 0.1,0.5", param_hint=option
        )
    if ":" not in text:
        return tuple(float(part) for part in parts)
    start, stop, step = parts
    if step <= 0 or stop < start or (stop - start) / step > 10_000:
        raise typer.BadParameter(f"{text!r}: the step must lead from START up to STOP", param_hint=option)
    return tuple(float(start + step * i) for i in range(int((stop - start) / step) + 1))
