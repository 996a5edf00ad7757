"""Folders as people have them: files that are not what they look like, and files of other tools beside the weights."""

import struct

import pytest
from conftest import write_checkpoint

import refimpl
from refimpl import InputError
from refimpl.errors import Remark
from refimpl.files import read_json, read_small

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 500\n"


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model", "Baichuan2-7B")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": [{"a": 1, "c": 2, "a": 1}]}'])
def test_a_key_that_is_there_twice(tmp_path, text):
    """Python takes the last value, other readers the first: such a config means two models."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="has the key 'a' twice"):
        read_json(tmp_path / "config.json")


def test_a_tensor_that_is_there_twice(tmp_path):
    entry = '"data_offsets":[0,4],"dtype":"F32","shape":[1]'
    header = f'{{"a":{{{entry}}},"a":{{{entry}}}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(InputError, match=r"model\.safetensors is not a valid safetensors file: .*(twice|[Dd]uplicate)"):
        refimpl.checkpoint.folder.map_tensors(tmp_path, "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model"])
def test_a_pointer_of_git_lfs(folder, name):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(POINTER)
    message = f"{name} is only git-lfs's pointer to the file; fetch it: git lfs pull"
    if name == "tokenizer.model":  # without its tokenizer, a model still computes
        with pytest.warns(Remark, match=message):
            refimpl.load(folder)
    else:
        with pytest.raises(InputError, match=message):
            refimpl.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_file_that_one_may_not_read(folder, name, monkeypatch):
    """Root may read everything, so the refusal is made here."""
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").rename(folder / name)

    def refuse(path, *rest, **options):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **options)

    real = open
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: refuse(path, "rb").read())
    with pytest.raises(InputError, match=f"cannot read .*{name}: Permission denied; ask its owner for permission"):
        refimpl.load(folder)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*a\.json: No such file or directory; is the path right"):
        read_small(tmp_path / "a.json")
