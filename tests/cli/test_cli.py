"""The command line as a person meets it: what it prints, and how it exits."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_checkpoint

from refimpl.bench import race as bench
from refimpl.bench import storage as bench_storage
from refimpl.cli import main
from refimpl.cli.parsing import command_line
from refimpl.cli.verbs import GROUPS, all_verbs

DATA = Path(__file__).parents[2] / "golden" / "data"


def test_the_poem_s_author(capsys):
    assert main(["generate", "-p", r"登鹳雀楼->王之涣\n夜雨寄北->", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("李商隐\n")


def test_sampling_repeats_with_a_seed(capsys):
    def draw(seed):
        arguments = ["-p", "秋风", "--max-new-tokens", "12", "--sample", "--temperature", "2", "--top-k", "50"]
        assert main(["generate", *arguments, "--seed", seed, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert draw("1") == draw("1") != draw("2")


def test_ids_come_out_where_there_is_no_tokenizer(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model", "Qwen2-7B")
    assert main(["generate", str(folder), "--ids", "5,17,9", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.split()) == 3


def test_ids_calibrate_a_model_without_a_tokenizer(tmp_path, capsys):
    folder = str(write_checkpoint(tmp_path / "model", "Qwen2-7B"))
    numbers = [str(i) for i in range(40)]
    (tmp_path / "ids.txt").write_text(" ".join(numbers[:20]) + "\n" + ",".join(numbers[20:]))
    for name, ids in (("listed", ",".join(numbers)), ("kept", str(tmp_path / "ids.txt"))):
        assert main(["calibrate", folder, "--ids", ids, "--out", str(tmp_path / name)]) == 0
        assert "from 40 tokens" in capsys.readouterr().out
    assert (tmp_path / "listed").read_bytes() == (tmp_path / "kept").read_bytes()
    for ids, said in ((["5,x"], "is not a list of whole numbers"), ([], "there is nothing to calibrate on"),
                      (["5,17", "--text", "a"], "there is both a text and token ids")):  # fmt: skip
        assert main(["calibrate", folder, *(["--ids", *ids] if ids else []), "--out", str(tmp_path / "x")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_chat(capsys):
    assert main(["chat", "-m", "《静夜思》的作者是谁？", "--max-new-tokens", "16"]) == 0
    assert "李白" in capsys.readouterr().out


def test_a_verb_that_is_told_to_end_leaves_nothing(tmp_path, monkeypatch):
    def half_made(folder, layers):
        folder.with_suffix(".part").write_bytes(b"many gigabytes")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(bench_storage, "write_checkpoint", half_made)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "quantize"])
    assert ended.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "wrong",
    [
        *(f"decode --{name} 0" for name in ("layers", "tokens", "threads", "rounds")),
        "load --layers 0",
        "load --threads 0",
    ],
)
def test_a_bench_of_none_is_refused(wrong, capsys, monkeypatch):
    monkeypatch.setattr(bench, "synthetic", None)
    monkeypatch.setattr(bench_storage, "_load", None)
    assert main(["bench", *wrong.split()]) == 2
    assert "and threads are numbers from 1" in capsys.readouterr().err


def test_a_bench_says_how_many_threads_it_has(capsys):
    from numba import config

    assert main(["bench", "attention", "--layers", "1", "--rounds", "1", "--tokens", "64", "--threads", "9999"]) == 0
    assert f", {config.NUMBA_NUM_THREADS} threads" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "Baichuan2-7B"


def test_a_trace_is_shown_and_stored(tmp_path, capsys):
    assert main(["trace", "-p", "秋风", "--taps", "*.layers.0.mlp.*", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"].rsplit(".", 1)[1] for row in rows] == ["gate_proj", "act_fn", "up_proj", "product", "down_proj"]
    assert main(["trace", "-p", "秋风", "--out", str(tmp_path / "trace")]) == 0
    from golden.bundle import read_trace

    assert "lm_head" in read_trace(tmp_path / "trace")


def test_golden_check_and_show(capsys):
    folder = DATA / "qwen2-tiny"
    assert main(["golden", "check", str(folder / "model"), str(folder / "golden")]) == 0
    assert capsys.readouterr().out.startswith("agrees: ")
    assert main(["golden", "show", str(folder / "golden")]) == 0
    assert "observed in PyTorch" in capsys.readouterr().out


def test_golden_check_tells_a_difference(tmp_path, capsys):
    """Another random model of the same sizes: it runs, and differs."""
    config = json.loads((DATA / "qwen2-tiny" / "model" / "config.json").read_text())
    write_checkpoint(tmp_path, "Qwen2-7B", seed=1, **config)
    assert main(["golden", "check", str(tmp_path), str(DATA / "qwen2-tiny" / "golden"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["agrees"] is False


def test_export_and_verify(tmp_path, capsys):
    out = str(tmp_path / "parts")
    assert main(["export", "--out", out, "--tokens", "4,1", "--context", "16", "--parts", "3", "--int4", "64"]) == 0
    assert main(["verify", out]) == 0
    assert "agrees" in capsys.readouterr().out
    assert main(["export", "--out", out, "--tokens", "4,1", "--context", "16"]) == 2
    assert "--force" in capsys.readouterr().err
    graph = next(Path(out).glob("prompt*3_of_3/model.data"))
    content = bytearray(graph.read_bytes())
    content[100] ^= 0x40
    graph.write_bytes(content)
    assert main(["verify", out]) == 2
    assert "is not the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "/no/such/folder"],
        ["generate", "--ids", "1,x"],
        ["generate", "--ids", "99999"],
        ["generate", "-p", ""],
        ["generate", "-p", "秋", "--dtype", "int7"],
        ["generate", "-p", "秋" * 600],
        ["generate", "-p", "秋", "--max-new-tokens", "0"],
        ["generate", "-p", "秋", "--sample", "--seed", "-1"],
        ["chat", "-m", "秋", "--max-new-tokens", "600"],
        ["chat", "-m", ""],
        ["trace", "-p", "秋", "--taps", "no.such.tensor"],
        ["golden", "check", "/no/such/golden"],
        ["golden", "show", "/no/such/golden"],
        ["export", "--out", "/proc/no/such", "--tokens", "0"],
        ["export", "--out", "/proc/no/such", "--parts", "99"],
        ["export", "--out", "/proc/no/such", "--context", "100000"],
        ["export", "--out", "/proc/no/such", "--int4", "7"],
        ["verify", "/no/such/export"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("refimpl: ") and said.err.count("\n") == 1 and not said.out


def test_bad_usage_exits_with_2():
    with pytest.raises(SystemExit) as exit:
        main(["no-such-verb"])
    assert exit.value.code == 2


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("exprot --out x", "there is no verb 'exprot'; did you mean 'export'? See refimpl --help"),
        ("golden chek", "there is no verb 'golden chek'; did you mean 'golden check'? See refimpl --help"),
        ("xyz", "there is no verb 'xyz'; see refimpl --help"),
        ("calibrate --txt a", "calibrate has no option '--txt'; did you mean '--text'? See refimpl calibrate --help"),
        ("hub status D --devise=x", "hub status has no option '--devise'; did you mean '--device'? See refimpl hub "
         "status --help"),
        ("convert SRC", "the following arguments are required: --out; see refimpl convert --help"),
    ],
)  # fmt: skip
def test_a_mistyped_word_gets_one_line_with_the_nearest(typed, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(typed.split())
    assert exit.value.code == 2 and capsys.readouterr().err == f"refimpl: {said}\n"


def test_values_that_look_like_options_are_no_mistyped_options():
    given = command_line("").parse_args(["hub", "infer", "D", "--device", "X", "--compile-options", "--a 1 --b"])
    assert given.compile_options == "--a 1 --b"
    given = command_line("").parse_args(["hub", "infer", "D", "--device", "X", "--compile-options=--a", "--dry"])
    assert given.compile_options == "--a" and given.dry_run, "an option may be shortened"


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_refimpl_alone_shows_the_groups(words, capsys):
    try:
        code = main(words)
    except SystemExit as exit:
        code = exit.code
    lines = capsys.readouterr().out.splitlines()
    groups = [line for line in lines if line in GROUPS.values()]
    assert code == 0 and groups == list(dict.fromkeys(GROUPS.values())) and all(len(line) <= 120 for line in lines)
    assert [line.split("  ")[1] for line in lines if line.startswith("  ")] == [
        " ".join(one.words) for one in all_verbs()
    ]


def test_python_m_refimpl_is_the_same():
    alone = run("refimpl")
    assert alone.returncode == 0 and alone.stdout.decode().startswith("usage: refimpl VERB") and not alone.stderr
    assert run("refimpl golden").stdout.startswith(b"usage: refimpl golden")


@pytest.mark.parametrize(
    "words", ["DIR OUT --max-lsb 3 --json", "DIR --max-lsb 3 OUT --json", "--max-lsb 3 --json DIR OUT"]
)
def test_options_may_stand_between_arguments(words):
    given = command_line("").parse_args(["verify", *words.split()])
    assert (given.folder, given.outputs, given.max_lsb, given.json) == ("DIR", "OUT", 3.0, True)
    given = command_line("").parse_args(["hub", "status", "--json", "DIR"])
    assert (given.folder, given.device, given.json) == ("DIR", None, True)


@pytest.mark.parametrize("one", all_verbs(), ids=lambda one: " ".join(one.words))
def test_every_verb_has_help_with_an_example(one, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*one.words, "--help"])
    said = capsys.readouterr().out
    assert exit.value.code == 0 and f"example: refimpl {' '.join(one.words)}" in said
    given = [option for option in one.options if not option.keywords.get("help")]
    assert not given, "every option says what it is for"
    command_line("").expect_known(shlex.split(one.example)[1:])


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m refimpl trace -p 秋风 | head -1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert run.stdout.startswith("model.embed_tokens") and "Traceback" not in run.stderr


def run(command, **environment):
    """A command line in a shell of its own, its exit code that of refimpl whoever reads."""
    command = f"set -o pipefail; {command.replace('refimpl', sys.executable + ' -m refimpl')}"
    given = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, env=given)


def test_a_red_verdict_stays_red_when_nobody_reads_on(tmp_path):
    config = json.loads((DATA / "qwen2-tiny" / "model" / "config.json").read_text())
    write_checkpoint(tmp_path, "Qwen2-7B", seed=1, **config)
    assert run(f"refimpl golden check {tmp_path} {DATA}/qwen2-tiny/golden | head -1").returncode == 1


def test_a_terminal_that_is_not_utf8():
    ascii_only = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    for command in ("generate --help", "generate -p 夜雨寄北 --max-new-tokens 4", "info"):
        found = run(f"refimpl {command}", **ascii_only)
        assert found.returncode == 0 and not found.stderr, command


def test_a_full_disk_behind_standard_output():
    found = run("refimpl info > /dev/full")
    assert found.returncode == 2 and found.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&-"])
def test_a_closed_stream_changes_no_exit_code(closed, tmp_path):
    assert run(f"refimpl info {closed}").returncode == 0
    assert run(f"refimpl info {tmp_path} {closed}").returncode == 2


def test_a_mapped_file_that_is_cut_is_named(tmp_path):
    """The weights are cut after they are mapped, as by another program that writes the folder anew."""
    folder = write_checkpoint(tmp_path / "model", "Qwen2-7B", seed=1, vocab_size=4096)
    program = f"""
import os, refimpl, refimpl.model
from refimpl.cli import main
mapped = refimpl.load
def load(*given, **options):
    model = mapped(*given, **options)
    os.truncate({str(folder / "model.safetensors")!r}, 4096)
    return model
refimpl.load = refimpl.model.load = load
raise SystemExit(main(["generate", {str(folder)!r}, "--ids", "4000,17,9"]))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
    assert f"{folder}/model.safetensors became shorter while it was read" in found.stderr


def test_what_a_model_says_moves_no_cursor(monkeypatch, capsys):
    """A terminal shows what would move its cursor or turn the reading direction; a file gets the text itself."""
    said = "a\x1b[2J\u202eb\n"
    for terminal, expected in ((True, "a\\x1b[2J\\u202eb\n"), (False, said)):
        stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr("refimpl.cli.command_line", lambda _: Typed(lambda _: print(said, end="") or 0))
        assert main([]) == 0
        assert stream.buffer.getvalue().decode() == expected


class Typed:
    """A command line that is understood as one verb."""

    def __init__(self, run):
        self.run = run

    def parse_args(self, _):
        return self


def test_the_command_line_imports_no_library_before_it_is_ready():
    """Ctrl-C is answered by `main`, so whatever takes long to import is imported inside it."""
    code = "import refimpl.cli, sys; print({'numpy', 'safetensors', 'numba', 'onnx'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_stray_error_names_its_file(tmp_path, monkeypatch, capsys):
    """Not every reader of files tells of each way to fail; then the file is named all the same."""
    monkeypatch.setattr("refimpl.cli.devices.load_model", lambda _: (tmp_path / "gone\n.data").stat())
    assert main(["export", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"refimpl: cannot use {tmp_path}/gone\\n.data: No such file or directory\n"


def test_the_demo_tells_the_story(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    story = capsys.readouterr().out
    for said in ("李商隐", "tensors agree", "perplexity", "graphs run by", "All of it agrees"):
        assert said in story
    assert len(story.splitlines()) < 25 and (out / "report.txt").exists()
    assert main(["demo", "--out", str(tmp_path)]) == 2  # a folder that is not an earlier demo's
