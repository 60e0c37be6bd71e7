"""The command tree: one literal table; each command's module is imported when that command is called."""

import inspect
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from textwrap import dedent
from typing import Annotated, TextIO

import typer

from clipmerge.errors import ClipmergeError, ClipmergeWarning
from clipmerge_cli.groups import flatten
from clipmerge_cli.show import plain

START, CHOOSE, MERGE = "Start here", "Choose on held-out images", "Merge"
MAKE, LOOK = "Make checkpoints", "Look and check"

MODULES = {START: "demo", CHOOSE: "choosing", MERGE: "merging", MAKE: "training", LOOK: "looking"}
"""Panel of the help → the module where its commands live."""

COMMANDS = {
    "demo": (START, "All of it in two minutes on real images, offline."),
    "soup": (CHOOSE, "Average checkpoints: uniform, greedy or learned soup."),
    "interpolate": (CHOOSE, "Between a base and a finetuned checkpoint (WiSE-FT)."),
    "patch": (CHOOSE, "Learn a new task, keep the old ones (PAINT)."),
    "add": (CHOOSE, "Add what finetuned checkpoints learned to the base (task addition)."),
    "negate": (CHOOSE, "Make the base forget a task (task negation)."),
    "analogy": (MERGE, "base + scale * (C + B - A), all as task vectors."),
    "merge": (MERGE, "Any expression over checkpoints, or a TOML recipe."),
    "leaderboard": (MERGE, "Run merging methods on the same models and compare them on images."),
    "methods": (MERGE, "List the methods that `merge` knows, with their options."),
    "task-vector": (MERGE, "Write finetuned minus base as a file of its own."),
    "convert": (MERGE, "Between layouts: open_clip, Hugging Face."),
    "finetune": (MAKE, "FLYP, cross-entropy, LP-FT, CAR-FT, linear probe, or from scratch."),
    "sweep": (MAKE, "Many finetunings over a search space, ready for a soup."),
    "statistics": (MAKE, "Take what `fisher` and `regmean` merge by, once for each checkpoint."),
    "evaluate": (LOOK, "Score checkpoints on labelled images."),
    "inspect": (LOOK, "What a checkpoint holds, and what it was merged from."),
    "compare": (LOOK, "How two checkpoints differ, per tower and block."),
    "verify": (LOOK, "Recompute a merged file from its parents."),
    "report": (LOOK, "One HTML page of everything that a folder holds."),
}
"""Command → its panel and what `clipmerge --help` says about it, without importing it."""


def application(wanted: str | None = None) -> typer.Typer:
    """The command tree, with the module of the command `wanted` imported and no other."""
    tree = typer.Typer(
        name="clipmerge",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    tree.callback()(_root)
    for name, (panel, summary) in COMMANDS.items():
        function = _function(name, MODULES[panel]) if name == wanted else lambda: None
        text = _explanation(function) if name == wanted else summary
        tree.command(name, help=text, short_help=summary, rich_help_panel=panel)(function)
    return tree


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code.

    0 done, 1 refused or failed, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    typed = args or _completed_words()
    wanted = next((word for word in typed if word in COMMANDS), None)
    warnings.showwarning = _warn
    with _signals() as came:
        code = _run(args, wanted, came)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away; what is left in the buffer must not be an error again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


def _completed_words() -> list[str]:
    """Return what stands on the line that a shell asks to complete: in bash's and fish's way, or zsh's."""
    if "_CLIPMERGE_COMPLETE" not in os.environ:
        return []
    return os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", "")).split()[1:]


class _Interrupted(KeyboardInterrupt):
    """A signal. Python ends by SIGINT, whatever the exit code, once a plain KeyboardInterrupt has left an exec()."""


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Make SIGTERM interrupt like Ctrl-C, so that nothing half-written stays. Yields the signals that have come.

    Torchrun's processes keep the system's SIGTERM: it is sent to those that wait, in code that no handler of Python's
    interrupts, for one that was lost.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise _Interrupted

    several = os.environ.get("WORLD_SIZE", "1") != "1"
    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _run(args: list[str], wanted: str | None, came: list[int]) -> int:
    try:
        application(wanted)(args=args, prog_name="clipmerge")
    except (SystemExit, KeyboardInterrupt) as end:
        code = 130 if isinstance(end, KeyboardInterrupt) else end.code
        if code == 130:
            return _stopped(came)
        words = args[args.index(wanted) + 1 :] if code == 2 and wanted in ("finetune", "sweep") else []
        if words and not words[0].startswith("-"):
            print(plain(f"hint: say where training starts with --base {words[0]}"), file=sys.stderr)
        return code if isinstance(code, int) else int(code is not None)
    except ClipmergeError as error:
        if came:
            return _stopped(came)
        return max(_refuse(error.message, error.hint), getattr(error, "exit_code", 1))
    except Exception as error:
        if came:  # some libraries turn an interruption into an error of their own, above all while they are imported
            return _stopped(came)
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _refuse(f"clipmerge broke: {what}", "this is a bug; please report it with the traceback above")
    return 0


def _stopped(came: list[int]) -> int:
    number = came[-1] if came else signal.SIGINT
    print("terminated" if number == signal.SIGTERM else "interrupted", file=sys.stderr)
    return 128 + number


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings as a remark, others as Python does."""
    ours = issubclass(category, ClipmergeWarning)
    text = f"note: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    print(plain(text), end="", file=file or sys.stderr)


def _refuse(message: str, hint: str | None) -> int:
    text = f"error: {message}" + (f"\n\nhint: {hint}" if hint else "")
    print(plain(text), file=sys.stderr)  # names in a message may come from a file
    return 1


def _function(name: str, module: str) -> Callable[..., None]:
    function = flatten(getattr(import_module(f"clipmerge_cli.{module}"), name.replace("-", "_")))

    @wraps(function)
    def interruptible(**options: object) -> None:
        try:
            function(**options)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None  # the same with every version of typer

    return interruptible


def _explanation(function: Callable[..., None]) -> str:
    """Return a command's docstring for `--help`: prose flows, indented paragraphs (examples) keep their lines."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(dedent(p) if p.startswith("    ") else " ".join(p.split()) for p in paragraphs)


def _version(asked: bool) -> None:
    if asked:
        from clipmerge.version import __version__

        typer.echo(f"clipmerge {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Merge finetuned CLIP checkpoints into one better model, chosen on held-out images.

    Start with [bold]clipmerge demo[/bold]. Every command explains itself: [bold]clipmerge soup --help[/bold].
    """


if __name__ == "__main__":
    sys.exit(main())
