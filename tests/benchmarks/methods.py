"""How fast are the methods: TIES against the linear pass, TSV-M and Iso-C against full SVDs; and do these agree?

    python tests/benchmarks/methods.py [--model ViT-B-32] [--tasks 8] [--blocks 12] [--rounds 3]
        [--device cuda] [--mergekit PATH/mergekit-pytorch]

Everything is measured in turns in one process, medians, CPU seconds beside wall seconds (which others' work on the
machine cannot lengthen as much). Checkpoints have open_clip's names and shapes and random numbers; with --blocks fewer
of them. The straight way computes every SVD in full, float64 and float32, with all threads that torch takes; of whole
models it reads all files, merges matrix by matrix in float64 (q, k and v apart, as ours does), and writes one file.
With --device cuda whole models are merged on the GPU by both, and ours on the CPU beside them.
"""

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from merge_pass import make, shapes_of
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits

import clipmerge as cm
from clipmerge.ops.matrices import iso_c, tsv
from clipmerge.weights.names import matrices_of
from clipmerge.weights.weights import Weights

Matrices = list[np.ndarray]


def tsv_straight(tasks: list[torch.Tensor]) -> torch.Tensor:
    k = min(tasks[0].shape) // len(tasks)
    parts = [torch.linalg.svd(task, full_matrices=False) for task in tasks]
    factors = []
    for stacked in (
        torch.hstack([u[:, :k] for u, _, _ in parts]),
        torch.hstack([v[:k].T for _, _, v in parts]),
    ):
        u, _, v = torch.linalg.svd(stacked, full_matrices=False)
        factors.append(u @ v)
    return (factors[0] * torch.cat([s[:k] for _, s, _ in parts])) @ factors[1].T


def iso_c_straight(tasks: list[torch.Tensor]) -> torch.Tensor:
    u, s, v = torch.linalg.svd(torch.stack(tasks).sum(0), full_matrices=False)
    return s.mean() * (u @ v)


def spectra(shape: tuple[int, int], tasks: int) -> dict[str, Matrices]:
    """Matrices like finetunings' (a power law of singular values), random ones, and ones that decay to 1e-5."""
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(shape) for _ in range(tasks)]
    bases = [np.linalg.svd(matrix, full_matrices=False) for matrix in drawn]
    size = min(shape)
    laws = {"trained": np.arange(1, size + 1) ** -0.7, "adversarial": np.geomspace(1, 1e-5, size)}
    shaped = {name: [(u * law) @ v for u, _, v in bases] for name, law in laws.items()}
    return {"random": drawn, **shaped}


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Name → median (wall, CPU) seconds; the functions take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {n: tuple(statistics.median(column) for column in zip(*t, strict=True)) for n, t in found.items()}


def report(title: str, measured: dict[str, tuple[float, float]], unit: str) -> None:
    print(title)
    for name, (wall, cpu) in measured.items():
        ratios = f"{wall / measured[unit][0]:6.2f} x wall {cpu / measured[unit][1]:6.2f} x CPU of {unit}"
        print(f"  {name:24} {wall:8.3f} s  CPU {cpu:8.3f} s  {ratios}")


def on_one_core(rule: Callable[..., np.ndarray], matrices: Matrices) -> np.ndarray:
    """As a merge runs it, which computes several matrices side by side instead."""
    with threadpool_limits(1, user_api="blas"):
        return rule(*matrices)


def straight_model(
    rule: Callable[[list[torch.Tensor]], torch.Tensor], paths: list[Path], out: Path, device: str
) -> None:
    """base + rule(task vectors), matrix by matrix; other tensors take the mean."""
    base, *tuned = [load_file(path, device) for path in paths]
    merged = {}
    for name, start in base.items():
        vectors = [(other[name].double() - start.double()) for other in tuned]
        count = matrices_of(name, tuple(start.shape))
        if count:
            parts = zip(*(vector.chunk(count) for vector in vectors), strict=True)
            update = torch.cat([rule(list(part)) for part in parts])
        else:
            update = torch.stack(vectors).mean(0)
        merged[name] = (start.double() + update).to(start.dtype).cpu()
    save_file(merged, out)


def disagreement(ours: Path, theirs: Path, base: Path) -> str:
    """Say how far updates differ, relative to their norm.

    Where the tasks' directions nearly coincide (below 1e-6 of the largest singular value of all side by side), ours
    leaves the direction out that a full SVD invents: such tensors are counted.
    """
    start, one, other = load_file(base), load_file(ours), load_file(theirs)
    differences = []
    for name, tensor in start.items():
        update = (other[name].double() - tensor.double()).norm()
        differences.append(
            float((one[name].double() - other[name].double()).norm() / update.clamp(min=1e-30))
        )
    agreeing = [difference for difference in differences if difference < 1e-5]
    largest = f"{len(agreeing)} of {len(differences)} tensors agree to {max(agreeing, default=0):.1e}"
    return (
        largest if len(agreeing) == len(differences) else f"{largest}, the others to {max(differences):.1e}"
    )


def mergekit_ties(command: str, paths: list[Path], folder: Path) -> Callable[[], None]:
    recipe, base = folder / "ties.yaml", paths[0]
    models = "".join(f"  - model: {path}\n" for path in paths[1:])
    parameters = "parameters: {density: 0.2, weight: 1.0, normalize: false}\ndtype: float32\n"
    recipe.write_text(f"merge_method: ties\nbase_model: {base}\nmodels:\n{models}{parameters}")
    arguments = [command, str(recipe), str(folder / "mergekit-out")]

    def run() -> None:
        shutil.rmtree(folder / "mergekit-out", ignore_errors=True)
        subprocess.run(arguments, check=True, capture_output=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--straight-rounds", type=int, default=1, help="of the straight way over whole models"
    )
    parser.add_argument("--device", default="cpu", help="where whole models' matrices are decomposed")
    parser.add_argument("--mergekit", help="the mergekit-pytorch command")
    options = parser.parse_args()
    shapes = {
        name: shape
        for name, shape in shapes_of(options.model).items()
        if "resblocks." not in name or int(name.split("resblocks.")[1].split(".")[0]) < options.blocks
    }
    for shape in ((768, 768), (3072, 768)) if options.device == "cpu" else ():
        for name, matrices in spectra(shape, options.tasks).items():
            tensors = [torch.from_numpy(matrix) for matrix in matrices]
            single = [tensor.float() for tensor in tensors]
            for rule, straight in ((tsv, tsv_straight), (iso_c, iso_c_straight)):
                expected = straight(tensors).numpy()
                error = np.linalg.norm(rule(*matrices) - expected) / np.linalg.norm(expected)
                ways = {
                    "ours": partial(on_one_core, rule, matrices),
                    "straight, float64": lambda s=straight, t=tensors: s(t),
                    "straight, float32": lambda s=straight, t=single: s(t),
                }
                title = f"{rule.__name__} {shape} {name}: agrees to {error:.1e}"
                report(title, timed(ways, options.rounds), "ours")
    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder), shapes, "F32", options.tasks + 1)
        zs, *tuned = [cm.load(path) for path in paths]
        vectors, out, theirs = [w - zs for w in tuned], Path(folder) / "out.st", Path(folder) / "straight.st"

        def save(weights: Weights, device: str = options.device) -> Callable[[], object]:
            return lambda: weights.save(out, force=True, digests=False, device=device)

        ways = {
            "linear": save(zs + 0.3 * sum(vectors[1:], vectors[0])),
            "ties": save(zs + cm.ties(vectors)),
            "magmax": save(zs + cm.magmax(vectors)),
            "tsv": save(zs + cm.tsv(vectors)),
            "iso_c": save(zs + cm.iso_c(vectors)),
        }
        whole = f"base + {options.tasks} x {options.model}"
        on_cpu = {
            "tsv, CPU": save(zs + cm.tsv(vectors), "cpu"),
            "iso_c, CPU": save(zs + cm.iso_c(vectors), "cpu"),
        }
        report(whole, timed(ways | (on_cpu if options.device != "cpu" else {}), options.rounds), "linear")
        for name, straight in (("tsv", tsv_straight), ("iso_c", iso_c_straight)):
            whole_way = partial(straight_model, straight, paths, theirs, options.device)
            pair = {"straight, float64": whole_way, name: ways[name]}
            measured = timed(pair, min(options.rounds, options.straight_rounds))
            report(f"{whole}: {disagreement(out, theirs, paths[0])}", measured, name)
        if options.mergekit:
            pair = {
                "ties": ways["ties"],
                "mergekit-pytorch ties": mergekit_ties(options.mergekit, paths, Path(folder)),
            }
            report(f"{whole}, mergekit in a process of its own", timed(pair, options.straight_rounds), "ties")
        else:
            print(
                "mergekit is left out: give --mergekit PATH/mergekit-pytorch (0.1.5, in its own environment)"
            )


if __name__ == "__main__":
    main()
