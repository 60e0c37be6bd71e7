"""`clipmerge convert`: any layout in, open_clip's or Hugging Face's names out."""

from enum import StrEnum
from typing import Annotated

import typer

from clipmerge_cli.options import HUB_FILE, Force, Json, Model, Output, Quiet


class Layout(StrEnum):
    """Whose names the output has."""

    open_clip = "open_clip"
    huggingface = "huggingface"


def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="File, folder, hf-hub:ORG/NAME or MODEL:TAG.")
    ],
    output: Output,
    to: Annotated[Layout, typer.Option("--to", help="Whose names to write.")] = Layout.open_clip,
    model: Model = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite a checkpoint as safetensors under open_clip's or Hugging Face's names, bit for bit.

    Reads OpenAI's TorchScript archives, training checkpoints, pickled modules and Hugging Face folders
    without running any code in them. DIR/ as output gets the model's configuration too (--model names the
    model where the checkpoint does not).

        clipmerge convert ViT-B-32.pt -o vit-b-32.safetensors
        clipmerge convert soup.safetensors --to huggingface -o soup-hf/
    """
    from clipmerge.checkpoint.convert import convert as write
    from clipmerge.checkpoint.convert import convert_folder
    from clipmerge.weights.weights import load
    from clipmerge_cli.progress import progress
    from clipmerge_cli.show import document, say, wrote

    weights = load(checkpoint)
    (opened,) = weights.checkpoints
    if output.name == HUB_FILE:
        from clipmerge.model.spec import resolve_model

        record = resolve_model(model, weights).to_metadata()
        with progress(quiet=quiet or json) as on_progress:
            path = convert_folder(
                opened, output.parent, to.value, record, force=force, on_progress=on_progress
            )
    else:
        with progress(quiet=quiet or json) as on_progress:
            path = write(opened, output, to.value, force=force, on_progress=on_progress)
    dropped = list(opened.extra.get("dropped", ()))
    if json:
        facts = {"from": opened.layout, "to": to.value, "output": path, "dropped": dropped}
        document({"kind": "convert", **facts})
        return
    if dropped:
        say(f"left out, as {to.value} has no place for them: {', '.join(dropped)}", quiet=quiet)
    say(f"{opened.layout} → {to.value}, {len(opened.tensors)} tensors", quiet=quiet)
    wrote(path, quiet=quiet)
