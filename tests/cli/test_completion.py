"""Completion in the shells themselves: what appears after a Tab."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from refimpl.cli import main

pytest.importorskip("shtab", reason="the extra completion is not installed")

TYPED = [
    (["refimpl", "gold"], ["golden"]),
    (["refimpl", "golden", "ch"], ["check"]),
    (["refimpl", "calibrate", "--me"], ["--method"]),
    (["refimpl", "calibrate", "--method", ""], ["minmax", "percentile", "mse"]),
    (["refimpl", "info", "/pro"], ["/proc"]),
    (["refimpl", "verify", "x", "--htm"], ["--html"]),
]


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
def test_bash_completes_verbs_options_choices_and_folders(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for words, expected in TYPED:
        line = " ".join(words)
        run = subprocess.run(["bash", "--norc", "-c", f"""
            source {tmp_path}/script
            COMP_WORDS=("${{@}}"); COMP_CWORD={len(words) - 1}; COMP_LINE={line!r}; COMP_POINT={len(line)}
            set -- $(complete -p refimpl)
            while [ "$1" != -F ]; do shift; done
            "$2"; printf '%s\\n' "${{COMPREPLY[@]}}"
            """, "-", *words], capture_output=True, text=True)  # fmt: skip
        assert run.stdout.split() == expected, (line, run.stderr)


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh here")
def test_zsh_completes_verbs_and_options(tmp_path, capsys):
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "_refimpl").write_text(capsys.readouterr().out)
    terminal, inside = pty.openpty()
    shell = subprocess.Popen(["zsh", "-f", "-i"], stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
                             env={**os.environ, "TERM": "dumb"})  # fmt: skip
    setup = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; echo SET''UP\n"
    os.write(terminal, setup.encode())
    assert b"SETUP" in read(terminal, b"SETUP")
    for typed, expected in ((b"refimpl calib\t", b"refimpl calibrate"), (b"--me\t", b"--method")):
        os.write(terminal, typed)
        assert expected in read(terminal, expected), typed
    os.write(terminal, b"\x15exit\n")
    shell.wait(20)
    os.close(terminal)
    os.close(inside)


def read(terminal, until, seconds=20):
    """What a terminal shows until a text stands there, or for so long."""
    shown, end = b"", time.monotonic() + seconds
    while until not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 1 << 16)
    return shown


def test_without_shtab_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "refimpl: completion needs the package shtab, which is not installed; pip install 'refimpl[completion]'\n"
    )
