"""Checkpoints that are damaged, hostile or of another model: one clear line each, and nothing executed or exhausted."""

import json
import os
import struct

import numpy as np
import pytest
from conftest import config_keys, write_checkpoint
from safetensors.numpy import load_file, save_file

import refimpl
from refimpl import InputError
from refimpl.checkpoint.pages import read_ahead
from refimpl.checkpoint.safetensors_files import map_safetensors
from refimpl.config import FAMILIES, config_from_keys


def test_the_families_are_told_apart(family):
    assert config_from_keys(config_keys(family)).family == family


def test_official_vocabularies_outweigh_other_signs():
    keys = config_keys("Baichuan2-7B", vocab_size=64000)
    assert config_from_keys(keys).family == "Baichuan-7B"
    keys = config_keys("Baichuan-13B", vocab_size=125696)
    assert config_from_keys(keys).family == "Baichuan2-13B"


def test_every_family_has_its_facts():
    facts = {f: config_from_keys(config_keys(f)) for f in FAMILIES}
    assert [f for f, c in facts.items() if c.norm_head] == ["Baichuan2-7B", "Baichuan2-13B"]
    assert [f for f, c in facts.items() if c.rope_theta is None] == ["Baichuan-13B", "Baichuan2-13B"]
    assert facts["Qwen2-7B"].rope_theta == 1e6 and facts["Baichuan2-7B"].rope_theta == 1e4
    assert facts["Qwen2-7B"].qkv_modules == ("q_proj", "k_proj", "v_proj") and facts["Qwen2-7B"].qkv_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"quantization_config": {}}, "quantization_config is"),
        ({"brand_new_key": 3}, "unknown keys brand_new_key"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        ({"hidden_size": 66}, "not a multiple of num_attention_heads"),
        ({"hidden_size": 60, "num_attention_heads": 4}, "RoPE rotates pairs"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ],
)
def test_what_a_config_may_not_say(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(config_keys("Baichuan2-7B", **changes)))
    with pytest.raises(InputError, match=message) as error:
        refimpl.load(tmp_path)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a":' * 100000, b"\xff\xfe"])
def test_a_config_that_is_no_json_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        refimpl.load(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="is not a file"):
        refimpl.load(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        refimpl.load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        refimpl.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_keys("Baichuan2-7B")))
    with pytest.raises(InputError, match="holds neither"):
        refimpl.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "has unknown extra"),
        (lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}), r"\(3,\), config.json .* \(64,\)"),
        (lambda t: t.update({"model.norm.weight": np.ones(64, np.int8)}), "is int8, expected float32"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((64, 128), np.float32)}), r"\(64, 128\)"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, change, message):
    write_checkpoint(tmp_path, "Baichuan2-7B")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        refimpl.load(tmp_path)


def safetensors_bytes(header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        safetensors_bytes({"a": ENTRY})[:-1],
        safetensors_bytes({"a": ENTRY}, length=2**62),
        safetensors_bytes({"a": ENTRY}, length=2**32),
        safetensors_bytes(b"{"),
        safetensors_bytes(b"[]"),
        safetensors_bytes(b'{"a":' * 5000),
        safetensors_bytes({"a": {**ENTRY, "data_offsets": [0, 17]}}),
        safetensors_bytes({"a": {**ENTRY, "data_offsets": [-4, 12]}}),
        safetensors_bytes({"a": {**ENTRY, "shape": [5]}}),
        safetensors_bytes({"a": {**ENTRY, "shape": [2**63, 2**63]}}),
        safetensors_bytes({"a": {**ENTRY, "shape": [-4]}}),
        safetensors_bytes({"a": {**ENTRY, "dtype": "F31"}}),
        safetensors_bytes({"a": {**ENTRY, "dtype": "F8_E4M3", "shape": [16]}}),
        safetensors_bytes({"a": ENTRY, "b": ENTRY}),
        safetensors_bytes({"a": {**ENTRY, "data_offsets": [16, 0]}}),
        safetensors_bytes({"a": 3}),
        safetensors_bytes({"a": ENTRY}, data=b"\0" * 32),
    ],
)
def test_hostile_safetensors(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors") as error:
        map_safetensors(path)
    assert "\n" not in str(error.value)


def test_mapping_reads_what_is_there(tmp_path):
    tensors = {
        "scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float16),
        "odd": np.arange(3, dtype=np.uint8), "matrix": np.arange(12, dtype=np.float64).reshape(3, 4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    mapped = map_safetensors(tmp_path / "x.safetensors")
    assert set(mapped) == set(tensors)
    for name, array in tensors.items():
        assert mapped[name].dtype == array.dtype and np.array_equal(mapped[name], array)
        assert not mapped[name].flags.writeable


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "expected the name of a file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected the name of a file beside it"),
        ({"weight_map": {"a": 7}}, "expected the name of a file beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, "is missing"),
        ({"weight_map": {"a": "here.safetensors"}}, "lacks a"),
    ],
)
def test_hostile_index(tmp_path, index, message):
    (tmp_path / "config.json").write_text(json.dumps(config_keys("Baichuan2-7B")))
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "here.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        refimpl.load(tmp_path)


def test_reading_a_large_weight_touches_only_its_rows(tmp_path):
    """Rows of a big matrix come as views of the map; nothing is converted that is not asked for."""
    save_file({"w": np.ones((4096, 512), np.float32)}, tmp_path / "x.safetensors")
    weight = refimpl.checkpoint.weights.Weight(map_safetensors(tmp_path / "x.safetensors")["w"])
    rows = weight.read(np.dtype(np.float32), slice(3, 9))
    assert rows.base is not None and np.shares_memory(rows, weight.array) and rows.shape == (6, 512)
    assert weight.read(np.dtype(np.float64), slice(3, 9)).nbytes == 6 * 512 * 8


@pytest.mark.parametrize("rows", [64, 4096], ids=["kept", "by rows"])
def test_numbers_between_two_places_are_copied_row_by_row(rows):
    """NumPy leaves BLAS for an array that does not lie on a multiple of its item's size."""
    array = np.random.default_rng(0).standard_normal((rows, 512)).astype(np.float32)
    shifted = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(np.float32).reshape(array.shape)
    assert not shifted.flags.aligned
    read = refimpl.checkpoint.weights.Weight(shifted).read(np.dtype(np.float32), slice(3, 9))
    assert read.flags.aligned and np.array_equal(read, array[3:9])
    assert rows == 64 or read.base is None, "no more than these rows"


def test_reading_ahead_changes_nothing(tmp_path):
    array = np.arange(40_000, dtype=np.float32).reshape(200, 200)
    save_file({"a": np.zeros(3, np.uint8), "b": array}, tmp_path / "x")
    mapped = map_safetensors(tmp_path / "x")["b"]
    for part in (mapped, mapped[3:7], mapped[199:], mapped[:0], mapped[:, 5], array, np.float32(4.0).reshape(())):
        read_ahead(part)
    assert np.array_equal(mapped, array)
