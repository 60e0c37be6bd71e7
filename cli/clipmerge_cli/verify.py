"""`clipmerge verify`: is a merged file what its record says?"""

from typing import TYPE_CHECKING

import typer

from clipmerge_cli import show
from clipmerge_cli.groups import arg, opt
from clipmerge_cli.options import Talk

if TYPE_CHECKING:
    from clipmerge.weights.verify import Verdict


def verify(
    *,
    file: str = arg("FILE", "A file that clipmerge wrote."),
    talk: Talk,
    parents: list[str] | None = opt(
        None, "Where to look for the parents, besides FILE's folder.", metavar="DIR"
    ),
) -> None:
    """Recompute a merged file from its parents and compare every bit.

    The parents are found by their content, whatever they are called now. Exit code 0: verified; 1: a tensor
    differs, a parent is missing, or the file has no record.

    Example: [bold]clipmerge verify soup.safetensors --parents checkpoints/[/bold]
    """
    from clipmerge.errors import CheckpointError
    from clipmerge.weights.verify import verify as verify_file

    with talk.progress() as on_progress:
        verdict = verify_file(file, parents or [], on_progress=on_progress)
    if talk.json:
        missing = [{"name": p.name, "file": p.file, "digest": p.digest} for p in verdict.missing]
        facts = {name: getattr(verdict, name) for name in ("status", "reason", "notation", "tensor")}
        show.document({"file": file, **facts, "parents": dict(verdict.parents), "missing": missing})
        if verdict.status != "verified":
            raise typer.Exit(1)
        return
    if verdict.status != "verified":
        raise CheckpointError(f"{file} is not verified: {verdict.reason}", hint=_hint(verdict))
    print(f"verified: {file}")
    for name, path in verdict.parents.items():
        talk.say(f"  {name} is {path}")
    talk.say(f"{verdict.notation}: {verdict.reason}")


def _hint(verdict: "Verdict") -> str:
    if verdict.status == "missing":
        missing = [
            f"{p.name}: {p.file or 'was in memory'}, content digest {p.digest}" for p in verdict.missing
        ]
        return "\n  ".join(["name the folders that hold them with --parents:", *missing])
    if verdict.status == "differs":
        return "the file or its record was changed after it was written; merge again"
    return "only files that clipmerge wrote, with digests, can be verified"
