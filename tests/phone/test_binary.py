"""What a context binary says of itself, and what is said of a file that is none."""

import importlib.util
import os
from pathlib import Path

import pytest

from export.phone.binary import Binary, CompiledGraph, Tensor, read_binary
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
        refused("is not a context binary, or damaged: Qualcomm's library says", read_binary, path)


def test_what_is_no_file_is_refused(tmp_path):
    refused("is not a file", read_binary, tmp_path / "nowhere.bin")
    refused("is not a file", read_binary, tmp_path)
    (tmp_path / "empty.bin").write_bytes(b"")
    refused("is empty", read_binary, tmp_path / "empty.bin")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"x")
    find = importlib.util.find_spec
    monkeypatch.setattr("export.run.htp.find_spec", lambda name: None if name == "onnxruntime_qnn" else find(name))
    for python, why in (((3, 12), r"onnxruntime-qnn is not installed; install refimpl\[htp\]"),
                        ((3, 10), "needs Python 3.11 or newer, and this is 3.10; make an environment")):  # fmt: skip
        monkeypatch.setattr("export.run.htp.sys.version_info", python)
        refused(why, read_binary, tmp_path / "a.bin")


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
