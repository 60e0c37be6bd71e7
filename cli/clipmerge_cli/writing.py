"""How commands that merge write their output, or show what they would write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.filesize import decimal as size

import clipmerge
from clipmerge.errors import RecipeError
from clipmerge_cli import show
from clipmerge_cli.groups import opt, refuse_unused
from clipmerge_cli.options import FORCE, HUB_FILE, OUTPUT, Talk, output_option

if TYPE_CHECKING:
    from clipmerge.types import Progress
    from clipmerge.weights.weights import Weights


WRITING = ("dtype", "shard_size", "allow_nonfinite", "threads", "digests", "fsync")
"""Options that say how a file is written."""


def _size(text: str) -> int:
    """Return `5GB` or `512MiB` in bytes."""
    from clipmerge.weights.recipe import parse_size

    try:
        return parse_size(text)
    except RecipeError as error:
        raise typer.BadParameter(f"{error.message}: {error.hint}") from error


@dataclass(frozen=True, kw_only=True)
class Output(Talk):
    """Where and how a merge is written.

    A file called open_clip_model.safetensors (what `-o DIR/` becomes) gets open_clip's configuration and a model
    card beside it.
    """

    output: Path | None = output_option(None)
    force: bool = FORCE
    dtype: str | None = opt(None, "fp32, fp16 or bf16; default: the first input's.", OUTPUT, metavar="DTYPE")
    shard_size: int | None = opt(
        None, "Write shards of at most this, e.g. 5GB.", OUTPUT, metavar="SIZE", parser=_size
    )
    resize_positions: bool = opt(
        False, "Bring positional embeddings to the base's (the first's) grid, as open_clip does.", OUTPUT
    )
    recalibrate: str | None = opt(
        None,
        "Take BatchNorm's running statistics of what is written on these images.",
        OUTPUT,
        metavar="DATA",
    )
    allow_nonfinite: bool = opt(False, "Let NaN and infinity through.", OUTPUT)
    threads: int | None = opt(None, "Threads of the merge.", OUTPUT, min=1)
    digests: bool = opt(
        True, "Do not hash the inputs, which `verify` needs.", OUTPUT, " /--no-digests", show_default=False
    )
    fsync: bool = opt(False, "Return when the output is on the disk, not in its cache.", OUTPUT)
    license: str | None = opt(
        None, "What the model card of -o DIR/ names; default: the inputs' own.", OUTPUT, metavar="NAME"
    )
    push_to_hub: str | None = opt(None, "Upload the folder written with -o DIR/.", OUTPUT, metavar="ORG/NAME")
    dry_run: bool = opt(False, "Check and show the plan; write nothing.", OUTPUT)

    def check_usage(self, *, needed: bool = False) -> None:
        """Refuse wrong usage: no output where one is `needed`, or options for an output that there is not."""
        if self.output is None and not self.dry_run:
            if needed:
                raise typer.BadParameter("say where to write: -o FILE", param_hint="--output")
            refuse_unused("without -o", "force", *WRITING)
        if self.recalibrate and self.output is None:
            raise typer.BadParameter("goes with an output: -o FILE", param_hint="--recalibrate")
        if self.output is None or self.output.name != HUB_FILE:
            for option, given in (("--push-to-hub", self.push_to_hub), ("--license", self.license)):
                if given:
                    raise typer.BadParameter("goes with a folder: -o DIR/", param_hint=option)

    def check(self, weights: "Weights", model: str | None, dtype: str | None, *, again: bool = False) -> None:
        """Refuse an output that could not be written, from headers alone: it exists, is an input, does not fit.

        Args:
            again: whether `weights` are what will be written, so that the file may be there already.
        """
        if self.output is None:
            return
        force, limit = self.force, self.shard_size
        if self.output.name == HUB_FILE:
            from clipmerge.report import model_folder

            model_folder.check_save(weights, self.output.parent, model=model, force=force, shard_size=limit)
        else:
            from clipmerge.weights.output_files import check_save

            named, out = model is not None, self.output
            check_save(
                weights, out, dtype=dtype, force=force, shard_size=limit, model_named=named, again=again
            )

    def write(
        self,
        weights: "Weights",
        record: Mapping[str, Any],
        on_progress: "Progress | None" = None,
        device: str = "auto",
    ) -> Path | None:
        """Write the weights, with `record` ("model", "selection") in their metadata, where an output was named.

        Args:
            device: where methods decompose matrices.
        """
        if self.output is None:
            return None
        self._say_gpu(weights, device)
        options: dict[str, Any] = {name: getattr(self, name) for name in ("force", *WRITING)}
        options |= {"metadata": record, "device": device, "on_progress": on_progress}
        if self.recalibrate is not None:
            options |= self._statistics(weights, record, on_progress)
        if self.output.name == HUB_FILE:
            from clipmerge.report.model_folder import save_folder

            return save_folder(weights, self.output.parent, license=self.license, **options)
        return weights.save(self.output, **options)

    def _say_gpu(self, weights: "Weights", device: str) -> None:
        """Say which GPU decomposes matrices, where one does."""
        from clipmerge.weights.run import decomposing_gpu

        if (gpu := decomposing_gpu(weights.terms, device)) is not None:
            from clipmerge.device import describe

            self.say(f"matrices are decomposed on {describe(gpu, 'fp64')}")

    def say_twins(self, models: "Sequence[Weights]") -> None:
        """Say which inputs are one checkpoint, by the digests that are remembered: one given twice, or the base."""
        from clipmerge.weights.digest import Digests

        names: dict[str, str] = {}
        every = {checkpoint for weights in models for checkpoint in weights.checkpoints}
        for checkpoint in sorted(every, key=lambda checkpoint: checkpoint.name):
            digests = Digests([checkpoint])
            digest = digests.finish()[checkpoint] if digests.complete else ""
            if digest and names.setdefault(digest, checkpoint.name) != checkpoint.name:
                self.say(f"{names[digest]} and {checkpoint.name} are the same checkpoint")

    def _statistics(
        self, weights: "Weights", record: Mapping[str, Any], on_progress: "Progress | None"
    ) -> dict[str, Any]:
        """Return what `save` takes for --recalibrate: the statistics, and a record of the images they are of."""
        from clipmerge.data.open import open_split
        from clipmerge.evaluate.recalibrate import recalibrate
        from clipmerge.model import ModelSpec

        assert self.recalibrate is not None
        split = open_split(self.recalibrate, role="train", on_progress=on_progress)
        model = ModelSpec.from_metadata(record["model"]) if record.get("model") else None
        statistics = recalibrate(weights, split, model=model, on_progress=on_progress)
        self.say(f"took {len(statistics)} running statistics of BatchNorm on {len(split)} images")
        about = {"data": split.digest, "images": len(split)}
        return {"statistics": statistics, "metadata": {**record, "recalibrated": about}}

    def finish(self, written: Path | None, *, there: bool = False) -> None:
        """Say what was written once the results are shown, and upload it if that was asked for.

        Args:
            there: the very bytes stood there before.
        """
        if written is None:
            return
        name = show.short(written)
        self.say(f"{name} is there already, with the same bytes" if there else f"wrote {name}")
        if self.push_to_hub:
            from clipmerge.report.model_folder import push

            self.say(f"uploaded to {push(written, self.push_to_hub)}")

    def say_left_alone(self, weights: "Weights") -> None:
        """Say which towers and heads some of the checkpoints lack, and whose are kept."""
        from clipmerge.weights.check import left_alone

        for sentence in left_alone(weights):
            self.say(sentence)

    def merge(
        self,
        weights: "Weights",
        *,
        model: str | None = None,
        device: str = "auto",
        document: Mapping[str, Any] | None = None,
        remark: str | None = None,
    ) -> None:
        """Write weights that nobody has to choose, or with --dry-run show what would be written.

        Args:
            model: what --model names, recorded in the file; None keeps what the checkpoints record.
            device: where methods decompose matrices.
            document: what --json prints beside the output.
            remark: said in the end.
        """
        self.check_usage(needed=True)
        if self.dry_run:
            self.plan(weights, model)
            self.say_left_alone(weights)
            self.say(f"{remark}\n" * bool(remark) + "dry run: nothing was written")
            return
        record = {}
        if model is not None:
            record = {"model": named_model(model, weights)}
        there = self.output is not None and not self.force and self.output.exists()
        with self.progress() as on_progress:
            written = self.write(weights, record, on_progress, device)
        self.say_left_alone(weights)
        self.say_twins([weights])
        if self.json:
            show.document({**(document or {"kind": "merge", "notation": repr(weights)}), "output": written})
        if remark:
            self.say(remark)
        if not record and weights.model is None:
            self.say(UNKNOWN_MODEL)
        self.finish(written, there=there)

    def plan(self, weights: "Weights", model: str | None) -> None:
        """Show the plan on stdout, after every check that headers and the output's folder allow."""
        from clipmerge.weights.look import describe

        plan = describe(weights, dtype=self.dtype, threads=self.threads)
        if model is not None:
            named_model(model, weights)
        self.check(weights, model, self.dtype, again=True)
        if self.json:
            show.document({"kind": "plan", **plan.to_json(), "output": self.output})
            return
        inputs = [
            (i.name, i.path or "in memory", i.layout, i.tensors, show.counts(i.dtypes), size(i.nbytes))
            for i in plan.inputs
        ]
        show.table(("input", "path", "layout", "tensors", "dtypes", "size"), inputs, title="Inputs")
        groups = [
            (g.formula, g.tensors, show.counts(g.towers), g.dtype, size(g.nbytes), g.example)
            for g in plan.groups
        ]
        show.table(("formula", "tensors", "where", "dtype", "size", "example"), groups, title="Tensors")
        read, written, memory = map(size, (plan.read_bytes, plan.written_bytes, plan.memory_bytes))
        sizes = f"reads {read}, writes {written}, works in {memory} at most"
        print(f"{plan.notation} gives {plan.gives}: {sizes}")


UNKNOWN_MODEL = "no input says which model it is for, nor will the file: say so with --model NAME"


def named_model(model: str, weights: "Weights") -> dict[str, Any]:
    """Return the record of the model that --model names, once the weights can be of it."""
    from clipmerge.model import refuse_misfit

    spec = clipmerge.resolve_model(model, weights)
    if weights.kind() == 1:
        refuse_misfit(weights, spec)
    return spec.to_metadata(stated=True)


def load_models(
    *files: str, origin: str | None = None, vectors: bool = False, resize: bool = False
) -> "list[Weights]":
    """Load a base and the models beside it.

    A task-vector file stands for the base plus that vector; towers that a model lacks are the base's.

    Args:
        origin: what the others were finetuned from, where that is not the base: each is then the base plus what its
            finetuning changed.
        vectors: the others are task vectors, though their files do not say so.
        resize: bring the others' positional embeddings to the base's grid.
    """
    from clipmerge.weights.input_checks import refuse_bare_vectors, refuse_swapped
    from clipmerge.weights.positions import resize_positions
    from clipmerge.weights.weights import load_leaves, placed

    first, *leaves = load_leaves([*files, *([origin] if origin else [])])
    if resize:
        leaves = [resize_positions(leaf, first) for leaf in leaves]
    base, start = placed(first, None), placed(leaves.pop(), None) if origin else None
    for leaf in leaves:
        refuse_swapped(start or base, leaf)
    under = (start or base) if base.kind() == 1 else None
    others = [placed(leaf, under, vector=vectors) for leaf in leaves]
    if base.kind() == 1:
        others = [base + w if w.kind() == 0 else base - start + w if start else w for w in others]
    refuse_mixture([base, *others])
    refuse_bare_vectors(clipmerge.mean([base, *others]))
    return [base, *others]


def without_statistics(files: list[str], talk: Talk) -> list[str]:
    """Leave out files of statistics, which lie beside their checkpoints where a glob meets them, and say so."""
    from clipmerge.weights.methods import METHODS
    from clipmerge.weights.statistics_files import is_statistics

    ends = tuple(f".{method.statistics}.safetensors" for method in METHODS.values() if method.statistics)
    left_out = [file for file in files if file.endswith(ends) and is_statistics(file)]
    if left_out:
        talk.say(f"left out, as they hold statistics of checkpoints: {', '.join(left_out)}")
    return [file for file in files if file not in left_out]


def refuse_mixture(weights: "Sequence[Weights]") -> None:
    """Refuse task vectors that stand among models."""
    vectors = [w for w in weights if w.kind() == 0]
    if vectors and len(vectors) < len(weights):
        raise RecipeError(
            f"{vectors[0].checkpoints[0].path} is a task vector, not a model",
            hint='add it to its base: clipmerge merge "base + 0.4*vector" base=FILE vector=FILE -o FILE',
        )
