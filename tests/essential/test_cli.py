"""The command line as a whole: what is printed, the exit code, and how long it takes."""

import pytest

from vla_foundry import cli


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code and what it wrote to both streams."""
    code = 0
    try:
        cli.main(list(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_an_unknown_command_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "trian")
    assert (code, out) == (2, "")
    assert err.startswith("error: The command 'trian' is unknown. Did you mean 'train'?")
    assert err.count("\n") == 1


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for command in ("train", "preprocess", "manifest", "generate", "quickstart"):
        assert f"\n  {command} " in out
