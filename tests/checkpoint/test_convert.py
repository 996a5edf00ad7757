"""Conversions: the same bytes from every layout, complete or not there, and what is merged is what was trained."""

import hashlib
import json
import mmap
import os
import resource
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from conftest import write_checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch_bytes import state_dict

import refimpl
from refimpl import InputError, cli
from refimpl.blocks.save import quantize_checkpoint
from refimpl.checkpoint import shards as module
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.lora import merge
from refimpl.info import examine

IDS = [5, 17, 9]


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "source", "Baichuan2-7B")


def digests(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_every_layout_gives_the_same_bytes(tmp_path, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "tokenizer_config.json").write_text("{}")
    before = digests(folder), [p.stat().st_mtime_ns for p in sorted(folder.iterdir())]
    convert(folder, tmp_path / "a")
    assert (digests(folder), [p.stat().st_mtime_ns for p in sorted(folder.iterdir())]) == before, "the source is read"

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(state_dict(dict(reversed(tensors.items()))))
    convert(folder, tmp_path / "b")
    (folder / "pytorch_model.bin").unlink()
    for shard in range(3):
        names = sorted(tensors)[shard::3]
        (folder / f"{shard}.bin").write_bytes(state_dict({name: tensors[name] for name in names}))
    places = {name: f"{k % 3}.bin" for k, name in enumerate(sorted(tensors))}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    convert(folder, tmp_path / "c")

    files = {"model.safetensors", "config.json", "conversion.json", "tokenizer_config.json", "SHA256SUMS"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == files
    for file in files - {"conversion.json", "SHA256SUMS"}:
        assert len({(tmp_path / out / file).read_bytes() for out in "abc"}) == 1
    told = [json.loads((tmp_path / out / "conversion.json").read_text()) for out in "abc"]
    assert [len(one.pop("source")) for one in told] == [3, 3, 6] and told[0] == told[1] == told[2]
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert all(np.array_equal(written[name], array) for name, array in tensors.items()) and len(written) == len(tensors)
    with safe_open(tmp_path / "a" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}, "transformers insists on it"


def test_the_manifest_is_that_of_sha256sum(tmp_path, folder):
    convert(folder, tmp_path / "out", shard_size="50KB")
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines())
    found = digests(tmp_path / "out")
    del found["SHA256SUMS"]
    assert sums == found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_formats(tmp_path, family, dtype, tiny_folder):
    source = tiny_folder(family)
    convert(source, tmp_path / "out", dtype=dtype)
    wanted = np.dtype(getattr(ml_dtypes, dtype, dtype))
    written, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    for name, array in original.items():
        assert written[name].dtype == wanted and np.array_equal(written[name], array.astype(wanted))
    assert refimpl.load(tmp_path / "out").config.torch_dtype == dtype


def test_buffers_stay_exact(tmp_path):
    """v1 saves the frequencies of its positions; they are no parameters."""
    folder = write_checkpoint(tmp_path / "source", "Baichuan-7B")
    tensors = load_file(folder / "model.safetensors")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    exact = (10000.0 ** (-np.arange(8) / 8)).astype(np.float32)
    save_file(tensors | {buffer: exact}, folder / "model.safetensors")
    convert(folder, tmp_path / "out", dtype="bfloat16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written[buffer].dtype == np.float32 and np.array_equal(written[buffer], exact)


BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("name", "buffer", "message"),
    [
        (BUFFER, [1, 2], "is a list, expected a tensor"),
        (BUFFER, np.ones((), np.float32), r"has shape \(\), config.json .* says \(8,\)"),
        (BUFFER, np.zeros(8, np.int8), "is int8, expected float32"),
        (BUFFER, np.zeros(8, ml_dtypes.float8_e4m3fn), "is float8_e4m3fn, expected float32"),
        (BUFFER, np.broadcast_to(np.float16(1), (1, 2**30)), r"has shape \(1, 1073741824\)"),
        ("x0.rotary_emb.inv_freq", np.ones(8, np.float32), r"unknown x0\.rotary_emb\.inv_freq"),
        (BUFFER.replace("0", "2"), np.ones(8, np.float32), "num_hidden_layers 3"),
        ("lm_head.weight", np.broadcast_to(np.float16(1), (1, 2**30)), r"has shape \(1, 1073741824\)"),
    ],
)
def test_buffers_that_are_none(tmp_path, name, buffer, message, monkeypatch):
    """Of what is not read, the name and shape are checked all the same: it would be converted."""
    folder = write_checkpoint(tmp_path / "source", "Baichuan-7B", tie_word_embeddings=True)
    tensors = {**load_file(folder / "model.safetensors"), name: buffer}
    for reader in (
        sys.modules["refimpl.checkpoint.convert"],
        sys.modules["refimpl.checkpoint.folder"],
        sys.modules["refimpl.info"],
    ):
        monkeypatch.setattr(reader, "read_checkpoint", lambda path: tensors)
    for read in (refimpl.load, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(InputError, match=message):
            read(folder)
    assert len(examine(folder)["problems"]) == 1


def test_shards(tmp_path, folder):
    convert(folder, tmp_path / "out", shard_size="50KB")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    sizes = [sum(tensors[n].nbytes for n, f in index["weight_map"].items() if f == file) for file in files]
    assert max(sizes) <= 50_000
    assert np.array_equal(refimpl.load(tmp_path / "out")(IDS), refimpl.load(folder)(IDS))


def test_an_interrupted_conversion_goes_on(tmp_path, folder, monkeypatch):
    out, written = tmp_path / "out", []
    write = module._write_shard

    def fail_at_the_third(path, shard, progress):
        if len(written) == 2:
            path.with_name(path.name + ".part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, shard, progress)

    monkeypatch.setattr(module, "_write_shard", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, shard_size="50KB")
    assert not out.exists() and not (tmp_path / "out.part" / "model.safetensors.index.json").exists()
    first = (tmp_path / "out.part" / written[0]).stat()

    with pytest.raises(InputError, match=r"left by another conversion"):
        convert(folder, out, shard_size="60KB")

    rest = []
    monkeypatch.setattr(module, "_write_shard", lambda path, *a: (rest.append(path.name), write(path, *a))[1])
    convert(folder, out, shard_size="50KB")
    assert rest and not set(rest) & set(written) and (out / written[0]).stat().st_ino == first.st_ino
    convert(folder, tmp_path / "at once", shard_size="50KB")
    assert digests(out) == digests(tmp_path / "at once")
    assert not (tmp_path / "out.part").exists()


def test_a_finished_shard_that_was_cut(tmp_path, folder, monkeypatch):
    """What stands in the journal is done only as long as the file is what was written."""
    write = module._write_shard

    def interrupt(path, *arguments):
        if path.name.startswith("model-00003"):
            raise KeyboardInterrupt
        return write(path, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(module, "_write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "out", shard_size="50KB")
    first, second = sorted((tmp_path / "out.part").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:1000])
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    convert(folder, tmp_path / "out", shard_size="50KB")
    convert(folder, tmp_path / "at once", shard_size="50KB")
    assert digests(tmp_path / "out") == digests(tmp_path / "at once")


def test_half_a_file_is_room_for_the_whole(tmp_path, folder, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(module, "write_shards", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(folder, tmp_path / "out")
    size = (folder / "model.safetensors").stat().st_size
    (tmp_path / "out.part" / "model.safetensors.part").write_bytes(bytes(size // 2))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("", (), {"free": size * 2 // 5}))
    with pytest.raises(InputError, match=r"^0\.0001\d* GB are to be written, .* has 0\.000\d+; free some"):
        convert(folder, tmp_path / "out")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("", (), {"free": size * 3 // 5}))
    convert(folder, tmp_path / "out")


def test_a_folder_that_happens_to_be_called_like_that(tmp_path, folder):
    stranger = tmp_path / "out.part"
    stranger.mkdir()
    for name in ("lock", "notes"):
        (stranger / name).write_text("mine")
        with pytest.raises(InputError, match=r"out\.part was not left by a conversion"):
            convert(folder, tmp_path / "out")
        assert {path.read_text() for path in stranger.iterdir()} == {"mine"}


def test_a_source_is_read_ahead(tmp_path, folder, monkeypatch):
    """Of a `.bin`, too, whose mapping lies deeper."""
    tensors = load_file(folder / "model.safetensors")
    for file, content in (("model.safetensors", None), ("pytorch_model.bin", state_dict(tensors))):
        if content:
            (folder / "model.safetensors").unlink()
            (folder / file).write_bytes(content)
        asked = []

        class Recording(mmap.mmap):
            def madvise(self, option, start, length, asked=asked):
                asked.append((start, start + length))

        with monkeypatch.context() as watched:
            watched.setattr(mmap, "mmap", Recording)
            convert(folder, tmp_path / file)
        at = (folder / file).read_bytes().index(tensors["lm_head.weight"].tobytes())
        stop = at + tensors["lm_head.weight"].nbytes
        assert any(start <= at and stop <= end for start, end in asked), file


def test_another_source_or_adapter_is_another_conversion(tmp_path, folder, monkeypatch):
    """Of the same sizes all of them, and the adapter even as old."""
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    tensors = write_adapter(adapter)
    with monkeypatch.context() as broken:
        broken.setattr(module, "write_shards", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(folder, out, lora=adapter)
    file = adapter / "adapter_model.safetensors"
    before = file.stat()
    save_file({name: array + 1 for name, array in tensors.items()}, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(InputError, match="left by another conversion"):
        convert(folder, out, lora=adapter)
    save_file(tensors, file)
    convert(folder, tmp_path / "other", lora=adapter)
    source = load_file(folder / "model.safetensors")
    save_file({name: array + 1 for name, array in source.items()}, folder / "model.safetensors")
    with pytest.raises(InputError, match="left by another conversion"):
        convert(folder, out, lora=adapter)


@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_a_source_that_changes_while_it_is_read(tmp_path, folder, monkeypatch, verb):
    """As while a download or a training goes on: the mapped weights would be half old and half new."""
    write = module.write_shards

    def and_meanwhile(work, *arguments):
        sums = write(work, *arguments)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes())
        return sums

    make = {"convert": convert, "quantize": lambda source, out: quantize_checkpoint(source, out, "int8")}[verb]
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(module, "write_shards", and_meanwhile)
        with pytest.raises(InputError, match=r"has changed while it was read: model\.safetensors; repeat"):
            make(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    make(folder, tmp_path / "out")


def test_two_conversions_to_one_place(tmp_path, folder, monkeypatch):
    """The second says so, and the first does not notice."""
    copy, said = module.copy_others, []

    def meanwhile(*arguments):
        for options in ({}, dict(dtype="bfloat16")):
            with pytest.raises(InputError, match="another conversion is writing") as error:
                convert(folder, tmp_path / "out", **options)
            said.append(str(error.value))
        copy(*arguments)

    monkeypatch.setattr(module, "copy_others", meanwhile)
    convert(folder, tmp_path / "out")
    monkeypatch.setattr(module, "copy_others", copy)
    convert(folder, tmp_path / "alone")
    assert len(said) == 2 and digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_a_disk_that_is_full(tmp_path, folder):
    """A limit on the size of files stands for it: the write of the first shard breaks off, and is done again."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(InputError, match=r"cannot make .*out: File too large; mend that and repeat") as error:
            convert(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert (tmp_path / "out.part" / "model.safetensors.part").stat().st_size == 100_000
    convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "at once")
    assert digests(tmp_path / "out") == digests(tmp_path / "at once") and not (tmp_path / "out.part").exists()


def test_a_place_that_cannot_be(tmp_path, folder, capsys, monkeypatch):
    (tmp_path / "plain").write_text("")
    assert cli.main(["convert", str(folder), "--out", str(tmp_path / "plain" / "x")]) == 2
    said = capsys.readouterr().err
    assert "cannot make" in said and "Not a directory" in said and said.count("\n") == 1
    assert cli.main(["convert", str(folder), "--out", "/"]) == 2
    assert "/ exists already" in capsys.readouterr().err
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["convert", str(folder), "--out", "x"]) == 2
    assert "the working directory cannot be read" in capsys.readouterr().err


def test_other_files_go_along(tmp_path, folder):
    """As Hugging Face's cache has them; a link out of the folder is refused before anything is written."""
    home = tmp_path / "models--x"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    snapshot = folder.rename(home / "snapshots" / "1")
    (home / "blobs" / "abc").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/abc")
    (snapshot / "LICENSE").write_text("free")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    (snapshot / "assets").mkdir()
    os.mkfifo(snapshot / "pipe")
    with open(snapshot / "notes", "wb") as sparse:
        sparse.truncate(96 << 20)
    tracemalloc.start()
    convert(snapshot, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, "no file is read at once"
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made >= {"tokenizer_config.json", "LICENSE", "NOTICE"} and not made & {"assets", "pipe"}
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    (tmp_path / "secret").write_text("my key")
    (snapshot / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"README\.md is not a file of this folder: it leads to .*secret"):
        convert(snapshot, tmp_path / "more")
    assert not list(tmp_path.glob("more*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="int8"), "dtype is 'int8'"),
        (dict(shard_size="many"), "the shard size is 'many'"),
        (dict(shard_size=0), "the shard size is 0"),
        (dict(lora="/nowhere"), "is not a folder"),
    ],
)
def test_bad_options(tmp_path, folder, options, message):
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_what_stands_in_the_way(tmp_path, folder, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(InputError, match="exists already"):
        convert(folder, tmp_path / "out")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(InputError, match="has 1e-06; free some"):
        convert(folder, tmp_path / "other")
    with pytest.raises(InputError, match="no NormHead to apply"):
        convert(write_checkpoint(tmp_path / "v1", "Baichuan-7B"), tmp_path / "more", normalize_head=True)


def test_numbers_beyond_float16(tmp_path, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight: a weight of magnitude 70000 is beyond float16"):
        convert(folder, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.glob("out*")), "another try would fail, too"
    convert(folder, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_normalised_head_runs_as_a_plain_one(tmp_path, folder, dtype):
    """Within what three roundings allow: of the element, of its row's length and of their quotient."""
    source = refimpl.load(folder)
    report = convert(folder, tmp_path / "out", dtype=dtype, normalize_head=True)
    plain = refimpl.load(tmp_path / "out")
    assert source.config.norm_head and not plain.config.norm_head
    head = plain.weights["lm_head.weight"].read(np.dtype(np.float64))
    exact = source.weights["lm_head.weight"].read(np.dtype(np.float64))
    unit = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert np.abs(head / exact - 1).max() < 3.1 * unit
    lengths = np.linalg.norm(head, axis=-1)
    assert report["row lengths"] == pytest.approx([lengths.min(), lengths.max()], abs=1e-6)
    if dtype == "float32":
        assert np.abs(plain(IDS, "float64") - source(IDS, "float64")).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_normalised_head_is_the_official_script_s(tmp_path, folder, dtype):
    torch = pytest.importorskip("torch")
    convert(folder, tmp_path / "stored", dtype=dtype)
    convert(tmp_path / "stored", tmp_path / "out", normalize_head=True)
    stored = load_file(tmp_path / "stored" / "model.safetensors")["lm_head.weight"].astype(np.float32)
    expected = torch.nn.functional.normalize(torch.from_numpy(stored).to(getattr(torch, dtype))).float().numpy()
    found = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].astype(np.float32)
    allowed = 2**-22 * np.abs(expected) if dtype == "float32" else 0  # sums of squares in another order
    assert (np.abs(found - expected) <= allowed).all()


# LoRA


RANK = 4


def write_adapter(folder, tensors=None, save=None, **changed):
    """An adapter on W_pack and down_proj, as peft writes it."""
    rng = np.random.default_rng(1)
    shapes = {"self_attn.W_pack": (192, 64), "mlp.down_proj": (64, 128)}
    targets = {f"model.layers.{i}.{module}": shape for i in range(2) for module, shape in shapes.items()}
    modules = sorted({name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in tensors or {}})
    if tensors is None:
        modules = ["W_pack", "down_proj"]
        tensors = {}
        for name, (rows, columns) in targets.items():
            at = f"base_model.model.{name}.lora_"
            tensors |= {
                f"{at}A.weight": rng.standard_normal((RANK, columns)),
                f"{at}B.weight": rng.standard_normal((rows, RANK)),
            }
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    keys = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 6,
        "target_modules": modules or ["W_pack"], "bias": "none", "lora_dropout": 0.1, "fan_in_fan_out": False,
        "modules_to_save": None, "rank_pattern": {}, "init_lora_weights": True, "use_dora": False,
        "inference_mode": True,
    }  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(keys | changed))
    if save == "bin":
        (folder / "adapter_model.bin").write_bytes(state_dict(tensors))
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize("save", ["safetensors", "bin"])
@pytest.mark.parametrize(("rooted", "scale"), [(False, 6 / RANK), (True, 6 / RANK**0.5)])
def test_an_adapter_is_merged(tmp_path, folder, rooted, scale, save):
    tensors = write_adapter(tmp_path / "adapter", save=save, use_rslora=rooted)
    convert(folder, tmp_path / "out", lora=tmp_path / "adapter")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    for name, array in before.items():
        pair = [tensors.get(f"base_model.model.{name.removesuffix('weight')}lora_{p}.weight") for p in "BA"]
        if pair[0] is None:
            assert np.array_equal(after[name], array)
        else:
            b, a = (part.astype(np.float64) for part in pair)
            exact = array + scale * b @ a
            assert np.abs(after[name] - exact).max() < 8 * 2**-24 * np.abs(exact).max()
    assert "adapter_model" in json.dumps(
        json.loads((tmp_path / "out" / "conversion.json").read_text())["options"]["lora"]
    )


A, B = (f"base_model.model.model.layers.0.mlp.up_proj.lora_{p}.weight" for p in "AB")
ONES = {A: np.ones((4, 64)), B: np.ones((128, 4))}


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        (dict(peft_type="IA3"), None, "expected 'LORA'"),
        (dict(use_dora=True), None, r"expected A \(4, 128\) and B \(64, 4\) and magnitude \(64,\)"),
        (dict(use_dora="yes"), None, "use_dora is 'yes', expected True"),
        (dict(lora_bias=True), None, r"and bias \(64,\)"),
        (dict(bias="some"), None, "bias is 'some'"),
        (dict(fan_in_fan_out=True), None, "fan_in_fan_out is True"),
        (dict(modules_to_save=["lm_head"]), None, "names lm_head as saved whole, but .* has no such tensor"),
        (dict(modules_to_save="lm_head"), None, "modules_to_save is 'lm_head', expected a list"),
        (dict(rank_pattern={"W_pack": 8}), None, r"expected A \(8, 64\)"),
        (dict(rank_pattern={"(a+)+$": 8}), None, "rank_pattern is .*, expected names of modules"),
        (dict(alpha_pattern={"W_pack": "8"}), None, "lora_alpha '8'"),
        (dict(alpha_pattern=["W_pack"]), None, "alpha_pattern is"),
        (dict(init_lora_weights="pissa_niter_4"), None, "init_lora_weights is 'pissa_niter_4'"),
        (dict(layer_replication=[[0, 1]]), None, "layer_replication is"),
        (dict(exclude_modules=["o_proj"]), None, "exclude_modules is"),
        (dict(ensure_weight_tying=True), None, "ensure_weight_tying is"),
        (dict(trainable_token_indices=[1]), None, "trainable_token_indices is"),
        (dict(layers_pattern="blocks"), None, "layers_pattern is 'blocks'"),
        (dict(target_modules=None), None, "target_modules is None, expected a list"),
        (dict(target_modules="all-linear"), None, r"disagree on whether .*mlp\.gate_proj"),
        (dict(target_modules=["W_pack", 4]), None, "expected a list of names"),
        (dict(target_modules=["W_pack"]), None, r"disagree on whether model\.layers\.0\.mlp\.down_proj\.weight, "),
        (dict(target_modules=["W_pack", "down_proj", "o_proj"]), None, r"0\.self_attn\.o_proj\.weight, .* is changed"),
        (dict(target_modules=["pack", "wn_proj"]), None, "disagree on whether"),
        (dict(layers_to_transform=[0]), None, r"layers\.1\.self_attn\.W_pack\.weight is changed"),
        (dict(layers_to_transform=1), None, r"layers\.0\.self_attn\.W_pack\.weight is changed"),
        (dict(layers_to_transform="0"), None, "layers_to_transform is '0'"),
        (dict(of_tomorrow=1), None, "of_tomorrow is 1"),
        (dict(r=0), None, "r is 0"),
        (dict(r="4"), None, "r is '4'"),
        (dict(lora_alpha=None), None, "lora_alpha None"),
        (dict(lora_alpha=True), None, "lora_alpha True"),
        (dict(use_rslora=1), None, "use_rslora 1"),
        ({}, {}, "changes nothing"),
        ({}, {A: ONES[A]}, "expected A"),
        ({}, {A: ONES[A], B: np.ones((128, 3))}, "expected A"),
        ({}, {A: np.ones((4, 65)), B: ONES[B]}, "expected A"),
        ({}, {"model.layers.0.mlp.up_proj.lora_A.weight": ONES[A]}, "expected lora_A"),
        ({}, {A.replace("weight", "other.weight"): ONES[A]}, "expected lora_A"),
        ({}, {"base_model.model.lm_head.weight": np.ones((96, 64))}, "expected lora_A"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": ONES[A]}, "expected lora_A"),
        ({}, {A.replace("up_proj", "gap_proj"): ONES[A], B.replace("up_proj", "gap_proj"): ONES[B]}, "gap_proj"),
        ({}, {"base_model.model.model.norm.lora_A.weight": ONES[A]}, "expected this model's linears"),
    ],
)
def test_adapters_that_are_not_understood(tmp_path, folder, keys, tensors, message):
    write_adapter(tmp_path / "adapter", tensors, **keys)
    with pytest.raises(InputError, match=message) as error:
        convert(folder, tmp_path / "out", lora=tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["lm_head.weight", "lm_head.modules_to_save.default.weight"])
def test_a_module_that_an_adapter_holds_whole(tmp_path, folder, form):
    write_adapter(tmp_path / "adapter", modules_to_save=["lm_head", "norm"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    rng = np.random.default_rng(3)
    head, norm = rng.standard_normal((96, 64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    pairs = load_file(file)
    save_file({**pairs, f"base_model.model.{form}": head, "base_model.model.model.norm.weight": norm}, file)
    convert(folder, tmp_path / "out", lora=tmp_path / "adapter")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(after["lm_head.weight"], head) and np.array_equal(after["model.norm.weight"], norm)
    with pytest.raises(InputError, match="before NormHead; merge it first"):
        convert(folder, tmp_path / "more", lora=tmp_path / "adapter", normalize_head=True)
    save_file({**pairs, f"base_model.model.{form}": head[1:], "base_model.model.model.norm.weight": norm}, file)
    with pytest.raises(InputError, match=r"is \(95, 64\), expected floats of shape \(96, 64\)"):
        convert(folder, tmp_path / "more", lora=tmp_path / "adapter")


@pytest.mark.parametrize("targets", [r".*\.(W_pack|down_proj)", "(a+)+$", ["W_pack", "down_proj"]])
def test_adapters_as_trainers_leave_them(tmp_path, folder, targets):
    """A regular expression for a target, which is not run; ranks and alphas of single modules; "default" in names."""
    plain = {"rank_pattern": {}, "alpha_pattern": {"layers.1.self_attn.W_pack": 10, "down_proj": 9}}
    tensors = write_adapter(tmp_path / "adapter", target_modules=targets, **plain)
    first = "base_model.model.model.layers.0.self_attn.W_pack.lora_"
    tensors[f"{first}A.weight"] = tensors[f"{first}A.weight"][:2]
    tensors[f"{first}B.weight"] = tensors[f"{first}B.weight"][:, :2]
    renamed = {name.replace(".weight", ".default.weight"): np.ascontiguousarray(a) for name, a in tensors.items()}
    save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors")
    keys = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    keys["rank_pattern"] = {"layers.0.self_attn.W_pack": 2}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(keys))
    convert(folder, tmp_path / "out", lora=tmp_path / "adapter")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    scales = {"layers.0.self_attn.W_pack": 6 / 2, "layers.1.self_attn.W_pack": 10 / RANK, "down_proj": 9 / RANK}
    for name, array in before.items():
        module = name.removesuffix(".weight")
        scale = next((scale for end, scale in scales.items() if module.endswith(end)), 0)
        at = f"base_model.model.{module}.lora_"
        change = scale * tensors[f"{at}B.weight"].astype(float) @ tensors[f"{at}A.weight"] if scale else 0
        assert np.abs(after[name] - (array + change)).max() < 8 * 2**-24 * np.abs(array + change).max()


def test_a_merged_weight_is_read_through_its_adapter_alone(tmp_path, folder):
    """No kernel may take its matrix as it lies: that is without the adapter."""
    write_adapter(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", refimpl.load(folder).weights)
    assert len(merged) == 4 and not any(hasattr(weight, "in_place") for weight in merged.values())


def test_an_adapter_of_the_normalised_head(tmp_path, folder):
    at = "base_model.model.lm_head.lora_"
    write_adapter(tmp_path / "adapter", {f"{at}A.weight": np.ones((4, 64)), f"{at}B.weight": np.ones((96, 4))})
    convert(folder, tmp_path / "out", lora=tmp_path / "adapter")
    with pytest.raises(InputError, match="before NormHead; merge it first"):
        convert(folder, tmp_path / "more", lora=tmp_path / "adapter", normalize_head=True)


def test_a_merged_weight_that_overflows(tmp_path, folder):
    write_adapter(tmp_path / "adapter", {A: ONES[A] * 1e5, B: ONES[B]})
    with pytest.raises(InputError, match=r"up_proj\.weight: a merged weight is not finite in float16"):
        convert(folder, tmp_path / "out", dtype="float16", lora=tmp_path / "adapter")


def test_peft_merges_the_same(tmp_path, folder):
    """Its own adapter file of a linear that is called W_pack, merged by it and by us."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    tensors = load_file(folder / "model.safetensors")

    class Attention(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.W_pack = torch.nn.Linear(64, 192, bias=False)
            self.W_pack.weight.data = torch.from_numpy(weight.copy())

    base = torch.nn.Module()
    base.model = torch.nn.Module()
    base.model.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    for i, layer in enumerate(base.model.layers):
        layer.self_attn = Attention(tensors[f"model.layers.{i}.self_attn.W_pack.weight"])
    generator = torch.Generator().manual_seed(0)
    variants: tuple[dict, ...] = (
        {}, dict(use_rslora=True), dict(layers_to_transform=[1]), dict(target_modules=r".*\.W_pack"),
        dict(rank_pattern={"layers.0.self_attn.W_pack": 2}, alpha_pattern={"^model.layers.1.self_attn.W_pack": 10}),
        dict(rank_pattern={"W_pack": 3}, alpha_pattern={"W_pack": 5}, use_rslora=True),
        dict(use_dora=True), dict(init_lora_weights="pissa"), dict(init_lora_weights="pissa", use_rslora=True),
    )  # fmt: skip
    for number, options in enumerate(variants):
        options = {"target_modules": ["W_pack"], "init_lora_weights": False, **options}
        config = peft.LoraConfig(r=RANK, lora_alpha=6, **options)
        adapted = peft.PeftModel(base, config)
        for name, parameter in adapted.named_parameters():  # as if trained
            if "lora_" in name:
                parameter.data += torch.randn(parameter.shape, generator=generator) * parameter.abs().mean() / 4
        adapter, out = tmp_path / f"adapter{number}", tmp_path / f"out{number}"
        adapted.save_pretrained(str(adapter))
        merged = adapted.merge_and_unload()
        convert(folder, out, lora=adapter)
        found = load_file(out / "model.safetensors")
        for i, layer in enumerate(merged.model.layers):
            name = f"model.layers.{i}.self_attn.W_pack.weight"
            expected = layer.self_attn.W_pack.weight.detach().numpy()
            assert np.array_equal(expected, tensors[name]) == (i not in options.get("layers_to_transform", [0, 1]))
            off = 2**-22 * np.abs(expected).max()
            if options["init_lora_weights"] == "pissa":  # peft's singular directions are in float32
                off += len(expected) ** 0.5 * 2**-24 * np.linalg.norm(tensors[name], 2)
            assert np.abs(found[name] - expected).max() < off
            layer.self_attn.W_pack.weight.data = torch.from_numpy(tensors[name].copy())
        base = merged


@pytest.mark.parametrize("options", [dict(bias="all"), dict(bias="lora_only"), dict(lora_bias=True)])
def test_peft_merges_the_same_biases(options, tmp_path, tiny_folder):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    folder, at = tiny_folder("Qwen2-7B"), "model.layers.0.self_attn"
    tensors = load_file(folder / "model.safetensors")
    base = torch.nn.Module()
    base.model, layer = torch.nn.Module(), torch.nn.Module()
    base.model.layers, layer.self_attn = torch.nn.ModuleList([layer]), torch.nn.Module()
    for linear_name in ("q_proj", "k_proj"):
        weight = torch.from_numpy(tensors[f"{at}.{linear_name}.weight"].copy())
        linear = torch.nn.Linear(*reversed(weight.shape))
        linear.weight.data, linear.bias.data = weight, torch.from_numpy(tensors[f"{at}.{linear_name}.bias"].copy())
        setattr(layer.self_attn, linear_name, linear)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights=False, **options
    )
    adapted = peft.PeftModel(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or (name.endswith("bias") and "bias" in options):
            parameter.data += torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merged = adapted.merge_and_unload().model.layers[0].self_attn
    convert(folder, tmp_path / "out", lora=tmp_path / "adapter")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for linear_name in ("q_proj", "k_proj") if options.get("bias") == "all" else ("q_proj",):
        for part in ("weight", "bias"):
            expected = getattr(getattr(merged, linear_name), part).detach().numpy()
            assert np.abs(found[f"{at}.{linear_name}.{part}"] - expected).max() < 2**-22 * np.abs(expected).max()
    assert not np.array_equal(found[f"{at}.q_proj.bias"], tensors[f"{at}.q_proj.bias"])


def test_the_command(tmp_path, folder, capsys):
    assert (
        cli.main(["convert", str(folder), "--out", str(tmp_path / "out"), "--normalize-head", "--dtype", "bfloat16"])
        == 0
    )
    said = capsys.readouterr().out
    assert "are in" in said and "lengths from 0.99" in said
    assert cli.main(["convert", str(folder), "--out", str(tmp_path / "more"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 17
    assert cli.main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_source_stays_as_it_is(tiny_folder):
    source = tiny_folder("Baichuan2-7B")
    with pytest.raises(InputError, match="which is only read"):
        convert(source, source / "inside")
    assert not (source / "inside").exists()
