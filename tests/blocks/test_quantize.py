"""Recipes, and quantized folders: what is saved is what was quantized, to the bit; whatever is wrong is one line."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import write_checkpoint
from safetensors.numpy import load_file, save_file

import refimpl
from golden.cost.reading import read_documents
from refimpl import InputError, cli
from refimpl.blocks import quantize as module
from refimpl.blocks.importance import Importance, observe_importance, read_importance, write_importance
from refimpl.blocks.quantize import Scheme
from refimpl.blocks.save import quantize_checkpoint
from refimpl.checkpoint import shards
from refimpl.checkpoint.weights import Int8Weight, NormHead, QuantizedWeight
from refimpl.model import EMBEDDED
from refimpl.names import input_of
from refimpl_kernels import formats
from refimpl_kernels.fast import search as fast_search

IDS = [5, 17, 9, 40]
F32 = np.dtype(np.float32)
# every format, and the options that change what is stored; matrices of 256 columns, for the blocks of Q4_K
WIDE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=90)
WAYS = [{"format": name} for name in formats.FORMATS] + [
    {"format": "int4", "block_size": 64, "symmetric": False},
    {"format": "int4", "block_size": 2, "axis": 0},
    {"format": "int4", "block_size": "channel"},
    {"format": "int4", "block_size": "tensor"},
    {"format": "matmulnbits", "block_size": 16, "symmetric": False, "search": 3},
    {"format": "nf4", "block_size": 100, "double": False},
    {"format": "fp4", "search": 2},
    {"format": "q4_k", "search": "mse"},
    {"format": "lpbq", "block_size": 32, "search": "mse"},
]
NAMES = ["-".join(map(str, way.values())) for way in WAYS]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide"), "Baichuan2-7B", **WIDE)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "source", "Baichuan2-7B")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quantized(model) -> dict[str, str]:
    return {n.removesuffix(".weight"): w.blocks.format for n, w in model.weights.items() if hasattr(w, "blocks")}


# Recipes -------------------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_decides(tiny_model):
    model = tiny_model("Baichuan2-7B")
    recipe = {
        "model.layers.0.mlp.down_proj": None, "*.mlp.*": "q4_0", "lm_head": {"format": "q8_0"},
        "*.W_pack": Scheme("int4", block_size=16, search=2),
    }  # fmt: skip
    small = model.quantize(recipe)
    mlp = {f"model.layers.{i}.mlp.{m}_proj": "q4_0" for i in (0, 1) for m in ("gate", "up", "down")}
    del mlp["model.layers.0.mlp.down_proj"]
    packs = {f"model.layers.{i}.self_attn.W_pack": "int4" for i in (0, 1)}
    assert quantized(small) == {**mlp, **packs, "lm_head": "q8_0"}, "and o_proj, which nothing matches, stays"
    assert small.weights["model.layers.0.self_attn.W_pack.weight"].blocks.block_size == 16
    assert small.weights.provenance["recipe"]["*.W_pack"] == {"format": "int4", "block_size": 16, "search": 2}
    named = model.quantize("q4_0", keep=("lm_head",))
    assert set(quantized(named).values()) == {"q4_0"} and "lm_head" not in quantized(named)
    assert isinstance(named.weights["lm_head.weight"], NormHead)


def test_the_head_is_quantized_as_it_is_used(tiny_model):
    model = tiny_model("Baichuan2-7B")
    head = model.weights["lm_head.weight"].read(F32)
    blocks = model.quantize({"lm_head": "q8_0"}).weights["lm_head.weight"].blocks
    assert np.array_equal(blocks.packed, formats.quantize(head, "q8_0").packed)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("q4_9", {}, "the format is 'q4_9', expected one of int4"),
        ({"*.W_pick": "q4_0"}, {}, r"'\*\.W_pick' matches no matrix; they are called model.layers.0.self_attn.W_pack"),
        ({"model.embed_tokens": "q4_0"}, {}, "matches no matrix"),
        ({"*": "q4_0", "lm_head": "q8_0"}, {}, "'lm_head' matches no matrix that is left: lm_head.weight is another"),
        ("q4_0", dict(keep=["*"]), r"'\*' matches no matrix that is left"),
        ({}, {}, "the recipe is empty"),
        ("int4", dict(block_size=48), "row length 64 is not a multiple of block_size 48; 16, 32, 64 are"),
        ("q4_0", dict(block_size=64), "block_size 64 does not exist in q4_0; use 32"),
        ("q4_k", {}, r"W_pack\.weight: row length 64 is not a multiple of block_size 256"),
        ("nf4", dict(block_size=100_000), r"W_pack\.weight: block_size 100000 is more than the 12288 weights"),
        ("int4", dict(block_size=True), "block_size is True"),
        ("int4", dict(axis=2), "int4 has no axis 2; its axes: 1, 0"),
        ("int4", dict(axis="rows"), "the axis is 'rows'"),
        ("q4_0", dict(axis=0), "q4_0 has no axis 0"),
        ("q8_0", dict(search="mse"), "q8_0 has no search for scales; int4, nf4"),
        ("q4_0", dict(search="best"), "search is 'best', expected 'mse' or a number"),
        ("q4_0", dict(search=-1), "search is -1"),
        ("q4_0", dict(symmetric=False), "q4_0 has no option 'symmetric'"),
        ("q4_0", dict(double=True), "q4_0 has no scales to quantize again"),
        ("q4_0", dict(symmetric=1), "symmetric is 1, expected true or false"),
        ({"*": {"format": "q4_0", "symmetric": None}}, {}, "symmetric is None, expected true or false"),
        ({"*": None}, {}, "quantizes no matrix; give a format to at least one"),
        ("q4_0", dict(bits=3), "the scheme is .*expected a format's name, or some of format, block_size"),
        ({"*": {"block_size": 32}}, {}, r"'\*': the scheme is"),
        ({"*": 4}, {}, r"'\*': the scheme is 4"),
        ({"*": ["q4_0"]}, {}, "the scheme is"),
        ({"*": {"format": ["q4_0"]}}, {}, r"the format is .*'q4_0'.*expected one of int4"),
        (4, {}, "the scheme is 4"),
        ({"*": "q4_0"}, dict(search="mse"), "search goes with a format's name"),
    ],
)
def test_what_a_recipe_may_not_say(tiny_model, tmp_path, recipe, options, message):
    model = tiny_model("Baichuan2-7B")
    for attempt in (
        lambda: model.quantize(recipe, **options),
        lambda: quantize_checkpoint(model.folder, tmp_path / "out", recipe, **options),
    ):
        with pytest.raises(InputError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder, tmp_path, bad):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    message = r"model\.layers\.1\.mlp\.up_proj\.weight: a weight is NaN or infinite"
    with pytest.raises(InputError, match=message):
        refimpl.load(folder).quantize("q4_0")
    with pytest.raises(InputError, match=message):
        quantize_checkpoint(folder, tmp_path / "out", "q4_0")
    assert not (tmp_path / "out").exists()


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_what_is_loaded_is_what_was_quantized(tmp_path, wide, way):
    model = refimpl.load(wide)
    recipe = {"*": way}
    small = model.quantize(recipe)
    small.save(tmp_path / "saved")
    quantize_checkpoint(wide, tmp_path / "streamed", recipe)
    assert files(tmp_path / "saved") == files(tmp_path / "streamed"), "the same bytes either way"
    again = refimpl.load(tmp_path / "saved")
    assert quantized(again) == quantized(small) and len(quantized(again)) == 6
    for name, weight in small.weights.items():
        found = again.weights[name]
        assert type(found) is type(weight)
        if isinstance(weight, QuantizedWeight):
            assert found.blocks.header() == weight.blocks.header() and found.rounded == weight.rounded
            assert found.blocks.arrays().keys() == weight.blocks.arrays().keys()
            for part, array in weight.blocks.arrays().items():
                assert np.array_equal(found.blocks.arrays()[part], array)
                assert found.blocks.arrays()[part].dtype == array.dtype
    assert np.array_equal(again(IDS), small(IDS))
    again.save(tmp_path / "twice")
    assert files(tmp_path / "twice").keys() == files(tmp_path / "saved").keys()
    held = "model.safetensors"
    assert (tmp_path / "twice" / held).read_bytes() == (tmp_path / "saved" / held).read_bytes()


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_tiles_and_threads_do_not_show(wide, monkeypatch, backend):
    monkeypatch.setenv("REFIMPL_BACKEND", backend)
    model = refimpl.load(wide)
    weight = model.weights["model.layers.0.mlp.up_proj.weight"].read(F32)
    for way in WAYS:
        scheme = Scheme(**way)
        whole = scheme.quantize(weight.astype(np.float16) if scheme.official else weight, None)
        whole = formats.nest(whole) if scheme.nested else whole
        for elements, threads in ((1 << 30, 1), (1 << 10, 1), (1 << 10, 3), (1 << 12, 2)):
            monkeypatch.setattr(module, "TILE_ELEMENTS", elements)
            name = "model.layers.0.mlp.up_proj.weight"
            with module.quantizing(model.weights, {name: scheme}, None, threads) as blocks:
                found = blocks(name)
            for part, array in whole.arrays().items():
                assert np.array_equal(found.arrays()[part], array), (way, elements, part)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_either_backend_quantizes_to_the_same_folder(tmp_path, monkeypatch, dtype):
    folder = write_checkpoint(tmp_path / "source", "Baichuan2-7B", dtype=dtype)
    kernel, used = fast_search.best_scales, []
    monkeypatch.setattr(fast_search, "best_scales", lambda *a, **k: (used.append(a), kernel(*a, **k))[1])
    recipe = {"lm_head": "q4_0", "*.mlp.*": {"format": "q4_0", "search": "mse"}, "*.W_pack": "nf4", "*": "q8_0"}
    for backend in ("numpy", "numba", "numba-int8"):
        monkeypatch.setenv("REFIMPL_BACKEND", backend)
        used.clear()
        quantize_checkpoint(folder, tmp_path / backend, recipe)
        assert bool(used) == (backend != "numpy")
    assert files(tmp_path / "numpy") == files(tmp_path / "numba") == files(tmp_path / "numba-int8")


def test_every_family(tmp_path, family, tiny_folder):
    quantize_checkpoint(tiny_folder(family), tmp_path / "out", "q4_0")
    loaded, memory = refimpl.load(tmp_path / "out"), refimpl.load(tiny_folder(family)).quantize("q4_0")
    assert np.array_equal(loaded(IDS), memory(IDS)) and quantized(loaded) == quantized(memory)


def test_a_tied_head_has_blocks_of_its_own(tmp_path):
    folder = write_checkpoint(tmp_path / "source", "Qwen2-7B", tie_word_embeddings=True)
    quantize_checkpoint(folder, tmp_path / "out", "q4_0")
    loaded = refimpl.load(tmp_path / "out")
    assert quantized(loaded)["lm_head"] == "q4_0"
    assert np.array_equal(loaded(IDS), refimpl.load(folder).quantize("q4_0")(IDS))
    quantize_checkpoint(folder, tmp_path / "kept", "q4_0", keep=["lm_head"])
    assert np.array_equal(
        refimpl.load(tmp_path / "kept")(IDS), refimpl.load(folder).quantize("q4_0", keep="lm_head")(IDS)
    )


def test_llm_int8_still_quantizes_its_inputs(tmp_path, folder):
    quantize_checkpoint(folder, tmp_path / "out", "int8")
    loaded = refimpl.load(tmp_path / "out")
    assert isinstance(loaded.weights["model.layers.0.mlp.up_proj.weight"], Int8Weight)
    assert np.array_equal(loaded(IDS), refimpl.load(folder).quantize("int8")(IDS))


def test_the_folder_is_mapped_and_checked_by_sha256sum(tmp_path, folder):
    (folder / "tokenizer_config.json").write_text("{}")
    report = quantize_checkpoint(folder, tmp_path / "out", "q4_0", shard_size="20KB")
    said = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert said["recipe"] == {"*": {"format": "q4_0"}} and said["source"]["model.safetensors"] > 0
    assert {k: said[k] for k in report} == report
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines())
    found = {name: hashlib.sha256(content).hexdigest() for name, content in files(tmp_path / "out").items()}
    assert len(said["files"]) > 3 and said["files"].items() < sums.items()
    del found["SHA256SUMS"]
    assert sums == found and (tmp_path / "out" / "tokenizer_config.json").exists()
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys["quantization_config"] == {"quant_method": "refimpl"}, "other software would read it wrongly"
    weight = refimpl.load(tmp_path / "out").weights["model.layers.0.mlp.up_proj.weight"]
    base = weight.blocks.packed
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap), "nothing is read at load"


def test_a_model_in_memory_is_saved_as_it_is(tmp_path, folder):
    model = refimpl.load(folder)
    model.save(tmp_path / "plain")
    assert not (tmp_path / "plain" / "quantization.json").exists()
    assert np.array_equal(refimpl.load(tmp_path / "plain")(IDS), model(IDS))
    with pytest.raises(InputError, match="exists already"):
        model.save(tmp_path / "plain")
    with pytest.raises(InputError, match="comes from no folder"):
        type(model)(model.config, model.weights).save(tmp_path / "no")


def test_an_interrupted_save_leaves_nothing(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(shards, "copy_others", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        refimpl.load(folder).quantize("q4_0").save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupted_quantization_goes_on(tmp_path, folder, monkeypatch):
    out, written, write = tmp_path / "out", [], shards._write_shard

    def fail_at_the_third(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *rest)

    monkeypatch.setattr(shards, "_write_shard", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(folder, out, "q4_0", shard_size="10KB")
    assert not out.exists()
    kept = (tmp_path / "out.part" / written[0]).stat().st_ino
    monkeypatch.setattr(shards, "_write_shard", write)
    with pytest.raises(InputError, match="left by another conversion"):
        quantize_checkpoint(folder, out, "q4_0", search="mse", shard_size="10KB")
    quantize_checkpoint(folder, out, "q4_0", shard_size="10KB")
    assert (out / written[0]).stat().st_ino == kept and not (tmp_path / "out.part").exists()
    quantize_checkpoint(folder, tmp_path / "once", "q4_0", shard_size="10KB")
    assert files(out) == files(tmp_path / "once")


def test_a_killed_process_is_taken_up_again(tmp_path):
    folder = write_checkpoint(tmp_path / "source", "Baichuan2-7B", **{**WIDE, "num_hidden_layers": 6})
    code = "import sys; from refimpl.blocks.save import quantize_checkpoint\n"
    code += "quantize_checkpoint(*sys.argv[1:], 'q4_k', shard_size='300KB')"
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "out.part").glob("*.safetensors")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.part" / "journal.json").exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    quantize_checkpoint(folder, tmp_path / "once", "q4_k", shard_size="300KB")
    assert files(tmp_path / "out") == files(tmp_path / "once")


def change(folder, edit):
    path = folder / "quantization.json"
    said = json.loads(path.read_text())
    edit(said)
    path.write_text(json.dumps(said))


UP = "model.layers.0.mlp.up_proj.weight"
NF4 = dict(format="nf4", axis=None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda said: said.update(version=2), "has version 2, expected 1; update refimpl"),
        (lambda said: said.pop("version"), "has version None"),
        (lambda said: said.update(version=True), "has version True"),
        (lambda said: said.update(version=1.0), "has version 1.0"),
        (lambda said: said.update(tensors=[]), "names no tensors"),
        (lambda said: said["tensors"].pop(UP), "has unknown model.layers.0.mlp.up_proj.weight.packed"),
        (lambda said: said["tensors"].update({"ghost.weight": said["tensors"][UP]}), "the files have no arrays of it"),
        (lambda said: said["tensors"][UP].update(format="q4_9"), "the format is 'q4_9'"),
        (lambda said: said["tensors"][UP].update(format=["q4_0"]), "its format is"),
        (lambda said: said["tensors"][UP].update(format="int8"), "int8"),
        (lambda said: said["tensors"][UP].update(shape=[64, 128]), "made for another shape"),
        (lambda said: said["tensors"][UP].update(shape=[1 << 23, 1 << 23]), "made for another shape"),
        (lambda said: said["tensors"][UP].update(shape=[-1, 64]), "its shape is"),
        (lambda said: said["tensors"][UP].update(shape="128x64"), "its shape is"),
        (lambda said: said["tensors"][UP].update(shape=[1e300, 64]), "its shape is"),
        (lambda said: said["tensors"][UP].update(block_size=0), "block_size is 0, expected a positive number"),
        (lambda said: said["tensors"][UP].update(NF4, block_size=1 << 40), "block_size 1099511627776 is more than the"),
        (lambda said: said["tensors"][UP].update(block_size="channel"), "its block_size is 'channel'"),
        (lambda said: said["tensors"][UP].update(axis=0), "with axis 0, which does not exist"),
        (lambda said: said["tensors"][UP].update(axis=True), "its axis is True|with axis True"),
        (lambda said: said["tensors"][UP].update(rounded="float8"), "it is rounded to 'float8'"),
        (lambda said: said["tensors"][UP].pop("axis"), "expected axis, block_size, format, shape"),
        (lambda said: said["tensors"].update({UP: 5}), "its entry is 5"),
        (lambda said: said["tensors"].update({"model.norm.weight": said["tensors"][UP]}), "stored unquantized, too"),
    ],
)
def test_hostile_manifests(tmp_path, folder, edit, message):
    quantize_checkpoint(folder, tmp_path / "out", "q4_0")
    change(tmp_path / "out", edit)
    with pytest.raises(InputError, match=message) as error:
        refimpl.load(tmp_path / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("part", ["scales", "nested_scales", "offset"])
def test_scales_that_are_not_finite_are_told(tmp_path, folder, part, capsys):
    quantize_checkpoint(folder, tmp_path / "out", "q4_0" if part == "scales" else "nf4")
    assert cli.main(["info", str(tmp_path / "out")]) == 0 and "NaN" not in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[f"{UP}.{part}"].reshape(-1)[0] = np.nan
    tensors["model.norm.weight"][3:5] = np.inf, np.nan
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    assert cli.main(["info", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"{UP}.{part}: 1 of " in said and "model.norm.weight: 2 of 64 numbers are NaN or infinite" in said
    assert cli.main(["generate", str(tmp_path / "out"), "--ids", "5,17", "--max-new-tokens", "2"]) == 2
    said = capsys.readouterr()
    assert not said.out and "the next token's logits are NaN or infinite" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tokens 5", "--tokens says how much of --text is read"),
        ("--text TEXT --tokens -5", "tokens is -5, expected how many to read"),
        ("--text TEXT --tokens 0", "tokens is 0, expected how many to read"),
        ("--text EMPTY", "empty.txt holds no text"),
        ("--block-size rows", "block_size is 'rows', expected a positive number, 'channel' or 'tensor'"),
        ("--block-size -32", "block_size is -32, expected a positive number"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text("\n\n")
    arguments = arguments.replace("TEXT", str(EMBEDDED / "held_out.txt")).replace("EMPTY", str(tmp_path / "empty.txt"))
    assert cli.main(["quantize", "--out", str(tmp_path / "out"), "--format", "int4", *arguments.split()]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_row_may_be_a_block(tmp_path, capsys):
    channel = ["--block-size", "channel", "--keep", "model.layers.*"]
    assert cli.main(["quantize", "--out", str(tmp_path / "out"), "--format", "int4", *channel]) == 0
    assert capsys.readouterr().out.startswith("1 matrix is quantized; ")


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_weights_beyond_float16_are_not_called_infinite(tmp_path, format):
    """bitsandbytes rounds to float16 first."""
    folder = write_checkpoint(tmp_path / "source", "Baichuan2-7B")
    tensors = load_file(folder / "model.safetensors")
    for large, message in ((1e5, f"weight is beyond 65504.*which {format} rounds"), (np.inf, "is NaN or infinite")):
        tensors[UP][5, 7] = large
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(InputError, match=message):
            refimpl.load(folder).quantize(format)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{UP}.scales"), "has no array 'scales'"),
        (lambda t: t.update({f"{UP}.packed": t[f"{UP}.packed"][:-1]}), "the file is cut short"),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].astype(np.float32)}), "expected float16"),
        (lambda t: t.update({f"{UP}.color": t[f"{UP}.scales"]}), "has no part called 'color'"),
        (lambda t: t.update({f"{UP}.code": np.zeros(16, np.float32)}), "has no part called 'code'"),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, folder, edit, message):
    quantize_checkpoint(folder, tmp_path / "out", "q4_0")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(InputError, match=message):
        refimpl.load(tmp_path / "out")


def test_files_cut_short(tmp_path, folder):
    quantize_checkpoint(folder, tmp_path / "out", "q4_0")
    for name in ("model.safetensors", "quantization.json"):
        content = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError):
            refimpl.load(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(content)
    (tmp_path / "out" / "quantization.json").unlink()
    with pytest.raises(InputError, match="lacks model"):
        refimpl.load(tmp_path / "out")


def test_what_cannot_be_done_with_a_quantized_folder(tmp_path, folder):
    from refimpl.checkpoint.convert import convert

    quantize_checkpoint(folder, tmp_path / "out", "q4_0")
    with pytest.raises(InputError, match=r"is it quantized\? convert what it was made of"):
        convert(tmp_path / "out", tmp_path / "more")
    quantize_checkpoint(tmp_path / "out", tmp_path / "other", {"*": "q8_0"})
    assert set(quantized(refimpl.load(tmp_path / "other")).values()) == {"q8_0"}, "of what it reads as"


# Importance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [3, 64])
def test_importance_is_the_mean_square_of_inputs(tiny_model, family, window):
    model, ids = tiny_model(family), np.arange(8) + 3
    found = observe_importance(model, ids, window)
    pieces = [model.trace(ids[i : i + window]) for i in range(0, len(ids), window)]
    matrices = {n.removesuffix(".weight") for n, w in model.weights.items() if len(w.shape) == 2}
    assert found.keys() == matrices - {"model.embed_tokens"} and found.meta["tokens"] == 8
    for name, numbers in found.items():
        x = np.concatenate([piece[input_of(name)][0] for piece in pieces]).astype(np.float64)
        assert numbers.dtype == F32
        np.testing.assert_allclose(numbers, (x * x).mean(0), rtol=1e-6)


def test_inputs_are_what_the_linears_multiply(tiny_model, family):
    """x @ w.T of the tap named is the linear's own output."""
    model = tiny_model(family)
    trace = model.trace(IDS, dtype="float64")
    for name, weight in model.weights.items():
        module = name.removesuffix(".weight")
        if len(weight.shape) == 2 and module != "model.embed_tokens":
            bias = model.weights.get(f"{module}.bias")
            product = trace[input_of(module)] @ weight.read(np.dtype(np.float64)).T
            product = product if bias is None else product + bias.read(np.dtype(np.float64))
            np.testing.assert_allclose(product, trace[module], rtol=1e-9, atol=1e-12)


def test_a_file_of_importance(tmp_path, tiny_model):
    found = observe_importance(tiny_model("Baichuan2-7B"), IDS)
    write_importance(tmp_path / "a", found)
    write_importance(tmp_path / "b", Importance(dict(reversed(found.items())), found.meta))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = read_importance(tmp_path / "a")
    assert again.meta == found.meta and again.sha256 == found.sha256 and again.keys() == found.keys()
    assert all(np.array_equal(again[name], found[name]) for name in found)
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes()[:-4])
    with pytest.raises(InputError, match="not a valid safetensors file"):
        read_importance(tmp_path / "c")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "d")
    with pytest.raises(InputError, match="holds no importance"):
        read_importance(tmp_path / "d")
    with pytest.raises(InputError, match="cannot write"):
        write_importance(tmp_path / "no" / "where", found)
    for bad in (np.array([np.nan], np.float32), np.array([-1], np.float32), np.ones((2, 2), np.float32), np.ones(2)):
        write_importance(tmp_path / "e", Importance({"lm_head": bad}, {}))
        with pytest.raises(InputError, match="'lm_head' is not a row of finite numbers"):
            read_importance(tmp_path / "e")


def test_importance_lowers_the_error_of_the_outputs(tmp_path):
    model = refimpl.load()
    ids = read_documents(EMBEDDED / "held_out.txt", model)
    importance = observe_importance(model, ids[:1000])
    down, errors = "model.layers.2.mlp.down_proj", {}
    x = model.trace(ids[1000:1500])[input_of(down)][0]
    exact = model.weights[f"{down}.weight"].read(F32)
    for way, options in {"nearest": {}, "mse": {"search": "mse"}, "importance": {"importance": importance}}.items():
        small = model.quantize("q4_0", **options)
        rest = exact - small.weights[f"{down}.weight"].read(F32)
        errors[way] = np.linalg.norm(rest), np.linalg.norm(x @ rest.T)
    assert errors["mse"][0] < errors["importance"][0], "of the weights alone, the plain search is best"
    assert errors["importance"][1] < errors["mse"][1] < errors["nearest"][1], "of the outputs, importance"

    quantize_checkpoint(EMBEDDED, tmp_path / "out", "q4_0", importance=importance)
    assert np.array_equal(refimpl.load(tmp_path / "out")(IDS), small(IDS))
    said = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert said["importance"]["sha256"] == importance.sha256 and said["importance"]["tokens"] == 1000
    mixed = model.quantize({"lm_head": "q8_0", "*": "q4_0"}, importance=importance)
    assert np.array_equal(mixed.weights[f"{down}.weight"].blocks.packed, small.weights[f"{down}.weight"].blocks.packed)


@pytest.mark.parametrize(
    ("importance", "recipe", "message"),
    [
        (Importance({}), "q4_0", "there is no importance of model.layers.0.self_attn.W_pack; collect it"),
        (Importance({"lm_head": np.ones(3, np.float32)}), {"lm_head": "q4_0"}, r"has shape \(3,\), expected \(64,\)"),
        (Importance({"lm_head": -np.ones(64, np.float32)}), {"lm_head": "q4_0"}, "finite and not negative"),
        (Importance({}), "q8_0", "no format of the recipe searches"),
        (Importance({}), {"*": {"format": "q4_0", "search": 0}}, "no format of the recipe searches"),
    ],
)
def test_importance_that_does_not_fit(tiny_model, importance, recipe, message):
    with pytest.raises(InputError, match=message):
        tiny_model("Baichuan2-7B").quantize(recipe, importance=importance)


# The command line ----------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path, capsys):
    out, kept, text = tmp_path / "q", tmp_path / "i", tmp_path / "text"
    text.write_text(
        "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。\n\n春眠不觉晓，处处闻啼鸟。\n", encoding="utf-8"
    )
    assert cli.main(["importance", "--text", str(text), "--out", str(kept)]) == 0
    assert "16 matrices" in capsys.readouterr().out
    common = ["quantize", "--format", "q4_k", "--keep", "lm_head"]
    assert cli.main([*common, "--out", str(out), "--importance", str(kept)]) == 0
    assert "15 matrices are quantized" in capsys.readouterr().out
    assert cli.main([*common, "--out", str(tmp_path / "same"), "--text", str(text), "--json"]) == 0
    assert files(out) == files(tmp_path / "same")
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 15

    assert cli.main(["info", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["quantized"] == ["15 matrices in q4_k, blocks of 256, 4.5 bits a weight"]
    assert facts["bits a weight"] == 4.5 and facts["stored as"] == "bfloat16, q4_k" and not facts["problems"]
    assert cli.main(["info", str(out)]) == 0 and "4.5 bits a weight" in capsys.readouterr().out
    assert cli.main(["generate", str(out), "-p", "白日依山尽，", "--max-new-tokens", "5", "--json"]) == 0
    ids = json.loads(capsys.readouterr().out)["ids"]
    small = refimpl.load().quantize("q4_k", keep="lm_head", importance=read_importance(kept))
    assert ids == list(small.generate("白日依山尽，", max_new_tokens=5))

    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"lm_head": "q8_0", "*.mlp.*": {"format": "int4", "block_size": 64, "search": "mse"}}')
    assert cli.main(["quantize", "--out", str(tmp_path / "r"), "--recipe", str(recipe)]) == 0
    assert set(quantized(refimpl.load(tmp_path / "r")).values()) == {"q8_0", "int4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --format or --recipe"),
        (["--format", "q4_0", "--recipe", "r.json"], "give either --format or --recipe"),
        (["--recipe", "/nowhere"], "cannot read /nowhere"),
        (["--format", "q4_7"], "the format is 'q4_7'"),
        (["--format", "q4_0", "--keep", "head"], "'head' matches no matrix"),
        (["--format", "q8_0", "--search", "mse"], "q8_0 has no search"),
        (["--format", "q4_0", "--text", "a", "--importance", "b"], "give either --importance or --text"),
        (["--format", "q4_0", "--importance", "/nowhere"], "cannot read /nowhere: No such file"),
        (["--format", "q4_0", "--shard-size", "huge"], "the shard size is 'huge'"),
    ],
)
def test_bad_usage_is_one_line(tmp_path, capsys, arguments, message):
    assert cli.main(["quantize", "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_graphs_of_a_quantized_folder(tmp_path, folder):
    from export import emit, verify

    quantize_checkpoint(folder, tmp_path / "q", "int4", block_size=16)
    emit(refimpl.load(tmp_path / "q"), tokens=[4], context=16, parts=1).save(tmp_path / "graphs")
    assert verify(tmp_path / "graphs", engine="reference")


def test_a_pool_of_another_size_gives_the_same_folder(tmp_path, wide):
    for threads in (1, 2, 5):
        quantize_checkpoint(wide, tmp_path / str(threads), "q4_k", threads=threads)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "5")


def test_the_bench_of_storage(monkeypatch, capsys):
    from refimpl.bench import storage as bench_storage

    small = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    keys = {**bench_storage.official_keys("Baichuan2-7B"), **small}
    monkeypatch.setattr(bench_storage, "official_keys", lambda family: keys)
    assert cli.main(["bench", "quantize", "--layers", "2", "--rounds", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in facts["rows"]}
    assert list(rows) == ["copy", "quantize", "quantize, cores", "search", "search, cores"]
    assert rows["quantize"]["times"] > 0 and facts["bytes"] > 2 * 2 * 96 * 64
    for way in ("quantize", "search"):
        slower = max("copy", f"{way}, cores", key=lambda name: rows[name]["seconds"])
        assert rows[way]["binds"] == ("the copy" if slower == "copy" else "the cores' arithmetic")
        assert rows[way]["reached"] == rows[slower]["seconds"] / rows[way]["seconds"]
    said = bench_storage.show(facts)
    assert "% of the " in said and ", which binds" in said
    assert "bfloat16 to q4_0" in said and "x copy" in said and "MB of memory at most" in said
    assert cli.main(["bench", "quantize", "--layers", "1", "--rounds", "1", "--format", "q8_0"]) == 0
    assert "search" not in capsys.readouterr().out
    monkeypatch.setattr(bench_storage, "write_checkpoint", None)  # which takes minutes: arguments are looked at before
    assert cli.main(["bench", "quantize", "--layers", "1", "--format", "q9"]) == 2
    assert "the format is 'q9', expected one of int4" in capsys.readouterr().err
    assert cli.main(["bench", "load", "--rounds", "0"]) == 2
    assert "numbers from 1" in capsys.readouterr().err


def test_a_model_travels_with_its_recipe(tiny_model):
    """Who unpickles it makes the same blocks."""
    model = tiny_model("Baichuan2-7B")
    recipe = {"lm_head": None, "*.mlp.*": {"format": "int4", "block_size": 16, "search": 3}, "*": "q4_0"}
    small = model.quantize(recipe, importance=observe_importance(model, IDS))
    again = pickle.loads(pickle.dumps(small))
    assert quantized(again) == quantized(small) and again.weights.provenance == small.weights.provenance
    assert np.array_equal(again(IDS), small(IDS))
