"""What a context binary says of itself, and what is said of a file that is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.phone.binary import Binary, CompiledGraph, Tensor, is_binary, read_binary
from export.run.child import Child
from export.run.socs import SOCS, soc_called, soc_numbered
from refimpl import InputError


def refused(why, call, *arguments):
    with pytest.raises(InputError, match=why) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_binaries_are_refused_in_one_line(tmp_path):
    pytest.importorskip("onnxruntime_qnn")
    for number, content in enumerate((b"x", b"version https://git-lfs", os.urandom(10_000), bytes(4096))):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(content)
        refused("is no context binary, or damaged: Qualcomm's library says", read_binary, path)


def test_what_is_no_file_is_refused(tmp_path):
    refused("is not a file", read_binary, tmp_path / "nowhere.bin")
    refused("is not a file", read_binary, tmp_path)
    (tmp_path / "empty.bin").write_bytes(b"")
    refused("is empty", read_binary, tmp_path / "empty.bin")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    """A folder whose `onnxruntime_qnn` cannot be found stands for a machine without it."""
    (tmp_path / "a.bin").write_bytes(b"x")
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'onnxruntime_qnn' else find(name, *rest)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(
        r"onnxruntime_qnn is not installed; install refimpl\[htp\].*this is Python 3", read_binary, tmp_path / "a.bin"
    )


def test_names_with_what_onnxruntime_adds():
    name = "token_ar1_cl64_2_of_2"
    assert CompiledGraph(f"{name}_{name}_1784266234391481619_1_0", (), ()).called == name
    assert CompiledGraph("ar128_cl4096_2_of_5", (), ()).called == "ar128_cl4096_2_of_5"


def test_a_binary_as_text():
    tensor = Tensor("attention_mask", (1, 1, 1, 64), "ufixed16", 0.000763, 65535)
    assert str(tensor) == "attention_mask: (1, 1, 1, 64) ufixed16, scale 0.000763, zero point 65535"
    assert (tensor.bits, Tensor("input_ids", (1, 1), "int32").bits) == (16, 32)
    binary = Binary(Path("a.bin"), 4_530_000, "HTP", "v2.51", "2.40.0", "4.0.6", "", 69, ())
    assert str(binary).startswith("a.bin: 4.53 MB for HTP of 8-elite (soc_model 69)")


def test_socs():
    assert {soc.model for soc in SOCS.values()} >= {43, 57, 60, 69, 87, 88} and soc_called("8-elite").arch == "79"
    assert soc_numbered(12345) == "soc_model 12345"
    refused("soc is '9', expected one of 8-gen-2", soc_called, "9")


def test_checkpoints_of_pytorch_are_no_binaries(tmp_path):
    for name, head, said in (
        ("zip.bin", b"PK\3\4", False),
        ("old.bin", b"\x80\x02\x8a", False),
        ("b.bin", b"\0\0", True),
    ):
        (tmp_path / name).write_bytes(head)
        assert is_binary(tmp_path / name) == said
    assert not is_binary(tmp_path) and not is_binary(tmp_path / "c.onnx")


# A child process.

SCRIPT = """
import ctypes, os, sys, time
from export.run.child import serve
from refimpl.errors import InputError
def answer(what):
    if what == "die":
        print("Error: it is broken", flush=True)
        ctypes.string_at(0)
    if what == "leave":
        os._exit(3)
    if what == "sleep":
        time.sleep(60)
    if what == "refuse":
        raise InputError("no")
    os.write(1, b"noise on stdout")
    yield {"said": what}
    yield {"said": what * 2}
serve(answer)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "child_of_test.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "child_of_test"


def test_a_child_answers_and_its_noise_is_no_answer(module):
    with Child(module) as child:
        for text in ("a", "b"):
            assert [answer["said"] for answer in child.ask(what=text)] == [text, text * 2]
        refused("^no$", list, child.ask(what="refuse"))
        assert next(child.ask(what="c"))["said"] == "c"


def test_a_dead_child_says_why(module):
    with Child(module) as child:
        refused("died of SIGSEGV, after it said: Error: it is broken", list, child.ask(what="die"))
        refused("died of SIGSEGV", list, child.ask(what="a"))
    with Child(module) as child:
        refused("ended with code 3", list, child.ask(what="leave"))
    with Child(module, limit=1) as child:
        refused("gave no answer for 1 seconds", list, child.ask(what="sleep"))


def test_a_child_ends_with_its_parent(module, tmp_path):
    """A parent that is killed leaves nothing running, though its child is in the middle of something."""
    script = (
        "import sys, time\nfrom export.run.child import Child\n"
        "child = Child('child_of_test').__enter__()\nprint(child._process.pid, flush=True)\n"
        'child._process.stdin.write(b\'{"what": "sleep"}\\n\'); child._process.stdin.flush(); time.sleep(60)\n'
    )
    path = os.pathsep.join(folder for folder in sys.path if folder)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        subprocess.run(["sleep", "0.1"], check=True)
    pytest.fail("the child is still there")
