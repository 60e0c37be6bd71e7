"""`clipmerge verify`: is a merged file what its record says?"""

from typing import TYPE_CHECKING, Annotated

import typer

from clipmerge_cli.options import Json, Quiet

if TYPE_CHECKING:
    from clipmerge.weights.verify import Verdict


def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file that clipmerge wrote.")],
    parents: Annotated[
        list[str] | None,
        typer.Option(
            "--parents", metavar="DIR", help="Where to look for the parents, besides FILE's folder."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Recompute a merged file from its parents and compare every bit.

    The parents are found by their content, whatever they are called now. Exit code 0: verified; 1: a tensor
    differs, a parent is missing, or the file has no record.

    Example: [bold]clipmerge verify soup.safetensors --parents checkpoints/[/bold]
    """
    from clipmerge.errors import CheckpointError
    from clipmerge.weights.verify import verify as check
    from clipmerge_cli.progress import progress
    from clipmerge_cli.show import document, plain, say

    with progress(quiet=quiet or json) as on_progress:
        verdict = check(file, parents or [], on_progress=on_progress)
    if json:
        document(_plain(file, verdict))
        if verdict.status != "verified":
            raise typer.Exit(1)
        return
    if verdict.status != "verified":
        raise CheckpointError(f"{file} is not verified: {verdict.reason}", hint=_hint(verdict))
    print(f"verified: {file}")
    for name, path in verdict.parents.items():
        say(f"  {name} is {path}", quiet=quiet)
    say(plain(f"{verdict.notation}: {verdict.reason}"), quiet=quiet)


def _hint(verdict: "Verdict") -> str:
    if verdict.status == "missing":
        lost = [f"{p.name}: {p.file or 'was in memory'}, content digest {p.digest}" for p in verdict.missing]
        return "\n  ".join(["name the folders that hold them with --parents:", *lost])
    if verdict.status == "differs":
        return "the file or its record was changed after it was written; merge again"
    return "only files that clipmerge wrote, with digests, can be verified"


def _plain(file: str, verdict: "Verdict") -> dict[str, object]:
    return {
        "file": file,
        "status": verdict.status,
        "reason": verdict.reason,
        "notation": verdict.notation,
        "tensor": verdict.tensor,
        "parents": dict(verdict.parents),
        "missing": [{"name": p.name, "file": p.file, "digest": p.digest} for p in verdict.missing],
    }
