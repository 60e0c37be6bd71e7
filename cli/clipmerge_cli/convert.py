"""`clipmerge convert`: any layout in, open_clip's or Hugging Face's names out."""

from pathlib import Path
from typing import Literal

from clipmerge_cli import show
from clipmerge_cli.groups import arg, opt
from clipmerge_cli.options import FORCE, HUB_FILE, MODEL, Talk, output_option


def convert(
    *,
    checkpoint: str = arg("CKPT", "File, folder, hf-hub:ORG/NAME or MODEL:TAG."),
    output: Path = output_option(...),
    talk: Talk,
    to: Literal["open_clip", "huggingface"] = opt("open_clip", "Whose names to write."),
    model: str | None = MODEL,
    force: bool = FORCE,
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
