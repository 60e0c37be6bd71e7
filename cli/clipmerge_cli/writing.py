"""How commands that merge write their output, or show what they would write."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clipmerge_cli import show
from clipmerge_cli.progress import OnProgress, progress

if TYPE_CHECKING:
    from clipmerge.weights.expression import Weights

_DTYPES = {
    "fp64": "F64", "float64": "F64", "fp32": "F32", "float32": "F32", "float": "F32",
    "fp16": "F16", "float16": "F16", "half": "F16", "bf16": "BF16", "bfloat16": "BF16",
}  # fmt: skip
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Writing:
    """How the output is written: the options of that name."""

    output: Path | None
    force: bool = False
    dtype: str | None = None
    shard_size: str | None = None
    allow_nonfinite: bool = False
    threads: int | None = None

    def check(self, *weights: "Weights", based: bool = True) -> None:
        """Refuse what would be refused at the end, before any work is done.

        Args:
            based: the first weights are a base, whose float dtypes the output takes; else all must agree.
        """
        from clipmerge.checkpoint.write import check_target
        from clipmerge.weights.check import check
        from clipmerge.weights.expression import mean

        inputs = [file for w in weights for c in w.checkpoints for file in c.files()]
        bytes_of(self.shard_size)
        check(mean(weights), dtype=dtype_of(self.dtype) or ("F32" if based else None))
        if self.output is not None:
            check_target(self.output, force=self.force, inputs=inputs)

    def write(
        self,
        weights: "Weights",
        metadata: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Write the weights, where an output was named."""
        if self.output is None:
            return
        weights.save(
            self.output,
            force=self.force,
            dtype=dtype_of(self.dtype),
            shard_size=bytes_of(self.shard_size),
            allow_nonfinite=self.allow_nonfinite,
            threads=self.threads,
            metadata=metadata,
            on_progress=on_progress,
        )


def merge_or_plan(weights: "Weights", writing: Writing, dry_run: bool, json: bool, quiet: bool) -> None:
    """Write weights that nobody has to choose, or with `--dry-run` show what would be written."""
    if dry_run:
        plan(weights, writing, json=json)
        return
    if writing.output is None:
        raise typer.BadParameter("say where to write: -o FILE", param_hint="--output")
    with progress(quiet=quiet or json) as on_progress:
        writing.write(weights, None, on_progress)
    if json:
        show.document({"kind": "merge", "notation": repr(weights), "output": writing.output})
    show.wrote(writing.output, quiet=quiet)


def plan(weights: "Weights", writing: Writing, *, json: bool) -> None:
    """What would be written, after every check that needs no tensor."""
    from clipmerge.weights.plan import make_plan

    made = make_plan(weights, dtype=dtype_of(writing.dtype))
    facts = {
        "notation": repr(weights),
        "total": int(weights.kind()),
        "inputs": [str(c.path or c.name) for c in weights.checkpoints],
        "tensors": len(made.steps),
        "output": None if writing.output is None else str(writing.output),
    }
    if json:
        show.document({"kind": "plan"} | facts)
        return
    shown = ", ".join(facts["inputs"]) if isinstance(facts["inputs"], list) else ""
    show.table(
        ("plan", ""), [(key, shown if key == "inputs" else str(value)) for key, value in facts.items()]
    )


def dtype_of(text: str | None) -> str | None:
    """`fp16` as safetensors calls it."""
    return None if text is None else _DTYPES.get(text.lower(), text.upper())


def bytes_of(text: str | None) -> int | None:
    """`5GB` or `512MiB` as a number of bytes; wrong form: exit 2."""
    if text is None:
        return None
    found = re.fullmatch(r"([\d.]+)\s*([KMG]I?)?B?", text.strip(), re.IGNORECASE)
    try:
        size = int(float(found.group(1)) * _UNITS[(found.group(2) or "").upper()]) if found else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB", param_hint="--shard-size")
    return size
