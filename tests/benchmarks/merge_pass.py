"""How fast and how lean is a merge, against the floor that the hardware sets and against other ways to do it.

    python tests/benchmarks/merge_pass.py [--models ViT-B-32] [--counts 2 8 16] [--mergekit PATH/mergekit-pytorch]

Everything is measured in turns in one process tree, warm page cache, medians; ratios are to the *floor*: reading
every input once and writing one output with `cat` and `cp`. Checkpoints have open_clip's real names and shapes
and random numbers. Needs about 11 GB of disk and as much free memory for 16 x ViT-B/32.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import clipmerge as cm
from clipmerge.checkpoint.safetensors import header
from clipmerge.checkpoint.tensors import Tensor

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: str) -> Shapes:
    """open_clip's names and shapes, without making the weights."""
    code = (
        "import torch, open_clip, json\n"
        f"with torch.device('meta'): m = open_clip.CLIP(**open_clip.get_model_config({model!r}))\n"
        "print(json.dumps({k: list(v.shape) for k, v in m.state_dict().items()}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {name: tuple(shape) for name, shape in json.loads(out.splitlines()[-1]).items()}


def make(folder: Path, shapes: Shapes, dtype: str, count: int) -> list[Path]:
    """`count` checkpoints: one random base, each with noise of its own added."""
    kind = {"F32": np.float32, "F16": np.float16}[dtype]
    tensors = {name: Tensor(dtype, shape, ()) for name, shape in shapes.items()}
    head, _offsets, size = header(tensors, {"format": "pt"})
    numel = (size - len(head)) // np.dtype(kind).itemsize
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1 << 22, dtype=np.float32) * 0.02
    paths = []
    for i in range(count):
        path = folder / f"{dtype}-{i}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        with path.open("wb") as file:
            file.write(head)
            for start in range(0, numel, noise.size):
                number = start // noise.size
                piece = np.roll(noise, number) + 0.05 * np.roll(noise, 7919 * (i + 1) + number)
                file.write(piece[: numel - start].astype(kind).tobytes())
    return paths


def floor(paths: list[Path], out: Path) -> None:
    out.unlink(missing_ok=True)
    with Path(os.devnull).open("wb") as null:
        subprocess.run(["cat", *map(str, paths)], stdout=null, check=True)
    subprocess.run(["cp", str(paths[0]), str(out)], check=True)


def ours(paths: list[Path], out: Path) -> None:
    cm.mean([cm.load(p) for p in paths]).save(out, force=True, digests=False)


def ours_without_torch(paths: list[Path], out: Path) -> None:
    """As in a program that has not imported torch: the pass asks what is imported, and takes its help."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        ours(paths, out)
    finally:
        sys.modules["torch"] = torch  # type: ignore[assignment]


def straight(paths: list[Path], out: Path) -> None:
    """Everything in memory: load_file, add_, save_file."""
    from safetensors.torch import load_file, save_file

    total = load_file(paths[0])
    for path in paths[1:]:
        for name, tensor in load_file(path).items():
            total[name].add_(tensor)
    save_file({name: tensor / len(paths) for name, tensor in total.items()}, out)


def process(code_or_args: list[str], env: dict[str, str]) -> None:
    subprocess.run(code_or_args, check=True, env=env, stdout=subprocess.DEVNULL)


def in_turns(ways: dict[str, Callable[[], None]], rounds: int, out: Path) -> dict[str, float]:
    """Median seconds of each way, all of them once in every round, the first round not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            out.unlink(missing_ok=True)
            shutil.rmtree(out.with_name("mergekit-out"), ignore_errors=True)
            os.sync()  # nobody pays for what another wrote
            start = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_memory(args: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Peak (anonymous, resident) megabytes of a command, polled."""
    child = subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL)
    anonymous = resident = 0.0
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "RssAnon" in fields:
            anonymous = max(anonymous, int(fields["RssAnon"].split()[0]) / 1e3)
            resident = max(resident, int(fields["VmRSS"].split()[0]) / 1e3)
        time.sleep(0.005)
    return anonymous, resident


def table(title: str, seconds: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:<34}{value:8.2f} s {value / seconds['floor']:7.2f} x floor", flush=True)


def study(model: str, dtype: str, count: int, folder: Path, args: argparse.Namespace) -> None:
    paths = make(folder, shapes_of(model), dtype, count)
    out = folder / "out.safetensors"
    ways = {
        "floor": lambda: floor(paths, out),
        "clipmerge, in process": lambda: ours_without_torch(paths, out),
    }
    if dtype != "F32":  # torch helps with narrow dtypes only
        ways["clipmerge, torch imported"] = lambda: ours(paths, out)
    if not args.quick:
        ways["straight loop, in process"] = lambda: straight(paths, out)
    table(f"{count} x {model} {dtype}: in process", in_turns(ways, args.rounds, out))
    if args.quick or (model, dtype, count) != ("ViT-B-32", "F32", 8):
        return
    soup = [sys.executable, "-m", "clipmerge", "soup", *map(str, paths), "-o", str(out), "--force", "-q"]
    cache = folder / "cache"
    env = {**os.environ, "CLIPMERGE_CACHE": str(cache)}

    def first_time() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        process(soup, env)

    me = [sys.executable, __file__, "--straight", *map(str, paths)]
    ways = {
        "floor": lambda: floor(paths, out),
        "clipmerge soup, first digests": first_time,
        "clipmerge soup, digests known": lambda: process(soup, env),
        "clipmerge soup --no-digests": lambda: process([*soup, "--no-digests"], env),
        "straight loop, own process": lambda: process([*me, "--out", str(out)], env),
    }
    if args.mergekit:
        ways["mergekit-pytorch linear"] = mergekit(args.mergekit, paths, folder)
    else:
        print("\nmergekit is left out: give --mergekit PATH/mergekit-pytorch (0.1.5, in its own environment)")
    table(f"{count} x {model} {dtype}: whole process", in_turns(ways, args.rounds, out))
    out.unlink(missing_ok=True)
    anonymous, resident = peak_memory(soup, env)
    print(f"  peak of clipmerge soup: {anonymous:.0f} MB anonymous, {resident:.0f} MB resident")


def mergekit(command: str, paths: list[Path], folder: Path) -> Callable[[], None]:
    recipe = folder / "linear.yaml"
    models = "".join(f"  - model: {p}\n    parameters: {{weight: 1.0}}\n" for p in paths)
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}dtype: float32\n")
    arguments = [command, str(recipe), str(folder / "mergekit-out")]

    def run() -> None:
        subprocess.run(arguments, check=True, capture_output=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-L-14"])
    parser.add_argument("--dtypes", nargs="+", default=["F32", "F16"])
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    parser.add_argument("--mergekit", help="the mergekit-pytorch command")
    parser.add_argument("--quick", action="store_true", help="only the floor and ours, in process")
    parser.add_argument("--straight", nargs="+", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.straight:
        straight(args.straight, args.out)
        return
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for model in args.models:
            for dtype in args.dtypes:
                for count in args.counts:
                    size = {"ViT-B-32": 605e6, "ViT-L-14": 1710e6}.get(model, 2e9) * (
                        0.5 if dtype == "F16" else 1
                    )
                    if (count + 2) * size > 0.8 * free:
                        print(
                            f"\n{count} x {model} {dtype}: left out, {count * size / 1e9:.0f} GB would not stay cached"
                        )
                        continue
                    folder = (args.folder or Path(temporary)) / model
                    folder.mkdir(parents=True, exist_ok=True)
                    study(model, dtype, count, folder, args)


if __name__ == "__main__":
    main()
