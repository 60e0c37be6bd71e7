"""`clipmerge convert`: any layout in, open_clip's or Hugging Face's names out."""

from typing import Annotated, Literal

import typer

from clipmerge_cli import show
from clipmerge_cli.groups import opt
from clipmerge_cli.options import HUB_FILE, Force, Model, OutputFile, Talk


def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="File, folder, hf-hub:ORG/NAME or MODEL:TAG.")
    ],
    output: OutputFile,
    talk: Talk,
    to: Annotated[Literal["open_clip", "huggingface"], opt("Whose names to write.")] = "open_clip",
    model: Model = None,
    force: Force = False,
) -> None:
    """Rewrite a checkpoint as safetensors under open_clip's or Hugging Face's names, bit for bit.

    Reads OpenAI's TorchScript archives, training checkpoints, pickled modules and Hugging Face folders
    without running any code in them. DIR/ as output gets the model's configuration too (--model names the
    model where the checkpoint does not).

        clipmerge convert ViT-B-32.pt -o vit-b-32.safetensors
        clipmerge convert soup.safetensors --to huggingface -o soup-hf/
    """
    from clipmerge.checkpoint import convert as convert_checkpoint
    from clipmerge.weights.weights import load

    weights = load(checkpoint)
    (source,) = weights.checkpoints
    with talk.progress() as on_progress:
        if output.name == HUB_FILE:
            from clipmerge.model.spec import resolve_model

            record = resolve_model(model, weights).to_metadata()
            path = convert_checkpoint.convert_folder(
                source, output.parent, to, record, force=force, on_progress=on_progress
            )
        else:
            path = convert_checkpoint.convert(source, output, to, force=force, on_progress=on_progress)
    dropped = list(source.extra.get("dropped", ()))
    if talk.json:
        facts = {"from": source.layout, "to": to, "output": path, "dropped": dropped}
        show.document({"kind": "convert", **facts})
        return
    if dropped:
        talk.say(f"left out, as {to} has no place for them: {', '.join(dropped)}")
    talk.say(f"{source.layout} → {to}, {len(source.tensors)} tensors")
    talk.say(f"wrote {show.short(path)}")
