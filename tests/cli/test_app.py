"""The frame of the command: what it imports, how it fails, which code it exits with."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clipmerge.errors import CheckpointError
from clipmerge_cli.app import COMMANDS, main

HEAVY = ("torch", "open_clip", "torchvision", "sklearn", "matplotlib", "pandas")


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipmerge", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def stand_in(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`clipmerge inspect` is a command that raises `error`."""
    module = ModuleType("clipmerge_cli.looking")

    def inspect(path: str = "x") -> None:
        raise error

    module.inspect = inspect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clipmerge_cli.looking", module)


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, (_, summary) in COMMANDS.items():
        assert f"{name} " in shown
        assert " ".join(summary.split()[:4]) in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"clipmerge {name}" in capsys.readouterr().out.split("Usage:")[1].split("\n", 1)[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_fit_a_terminal_of_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert main([name, "--help"]) == 0
    before_the_boxes = capsys.readouterr().out.split("╭")[0].splitlines()[2:]
    examples = [line.rstrip() for line in before_the_boxes if "clipmerge " in line or " --" in line]
    assert [line for line in examples if len(line) > 79 and not line.endswith(".")] == []


def test_neither_help_nor_import_loads_a_heavy_library() -> None:
    code = (
        "import sys, clipmerge\n"
        "from clipmerge_cli.app import COMMANDS, main\n"
        "codes = [main(['--help']), *(main([name, '--help']) for name in COMMANDS)]\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print('RESULT', set(codes), loaded)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "RESULT {0} []"


def test_no_words_show_the_help_and_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: clipmerge" in "".join(capsys.readouterr())


def test_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soop"]) == 2
    assert "No such command 'soop'" in capsys.readouterr().err


def test_a_word_that_is_no_choice_is_told_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "a.safetensors", "--data", "digits", "--metric", "topp1"]) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "'topp1' is not one of top1, top5, mean_per_class," in shown
    assert "; did you mean top1?" in shown
    assert "Value error" not in shown


def test_a_shell_completes_commands_and_their_options() -> None:
    def completed(line: str, shell: str = "bash") -> list[str]:
        words = line.split(" ")
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
        done = run(env={**os.environ, "_CLIPMERGE_COMPLETE": f"complete_{shell}", **asked})
        return done.stdout.split()

    assert completed("clipmerge so") == ["soup"]
    assert {"--greedy", "--val", "--output"} <= set(completed("clipmerge soup --"))
    assert "--greedy" in " ".join(completed("clipmerge soup --gr", "zsh"))
    named = {
        **os.environ,
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }  # else: the shell that runs the tests
    script = run("--show-completion", "bash", env=named).stdout
    assert "complete -o default -F _clipmerge_completion clipmerge" in script


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from clipmerge import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clipmerge {__version__}\n"


def test_an_error_of_ours_is_one_sentence_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, CheckpointError("a.pt is empty", hint="copy it again"))
    assert main(["inspect"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: a.pt is empty\n\nhint: copy it again\n")


def test_an_error_without_a_hint_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, CheckpointError("a.pt is empty"))
    assert main(["inspect"]) == 1
    assert capsys.readouterr().err == "error: a.pt is empty\n"


def test_an_unexpected_error_asks_for_a_report_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, KeyError("visual.proj"))
    assert main(["inspect"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith(
        "error: clipmerge broke: KeyError: 'visual.proj'\n\n"
        "hint: this is a bug; please report it with the traceback above\n"
    )


def test_an_interruption_is_one_line_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, KeyboardInterrupt())
    assert main(["inspect"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("module", ["typer", "clipmerge.weights.look"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_while_modules_are_imported_is_one_line(module: str, number: signal.Signals) -> None:
    """The second module raises an error of its own when it is interrupted, as some libraries do."""
    code = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        f"            try: signal.raise_signal({number.value})\n"
        "            except KeyboardInterrupt as error:\n"
        "                if '.' not in name: raise\n"
        "                raise ImportError('this import was disturbed') from error\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from clipmerge_cli import main\n"
        "sys.argv = ['clipmerge', 'inspect', 'x']\n"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if module == "typer" and number == signal.SIGTERM:  # before there is a handler, the system's own
        assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    else:
        word = "interrupted" if number == signal.SIGINT else "terminated"
        assert (done.returncode, done.stderr) == (128 + number, f"{word}\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m clipmerge --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("amount", [1, 1_000_000])
def test_a_reader_that_is_gone_before_a_command_prints_is_no_error(amount: int) -> None:
    code = (
        "import sys; from types import ModuleType; from clipmerge_cli.app import main\n"
        "module = sys.modules['clipmerge_cli.looking'] = ModuleType('looking')\n"
        f"def inspect() -> None: print('x' * {amount})\n"
        "module.inspect = inspect\n"
        "sys.exit(main(['inspect']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_other_door(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0
    assert done.stdout.startswith("clipmerge ")
    assert run("inspect").returncode == 2
