"""Models as GGUF files and back: the same bits here, llama.cpp's own logits there."""

import numpy as np
import pytest
from conftest import write_checkpoint

import refimpl
from refimpl import InputError, cli
from refimpl.blocks.gguf_out import write_gguf
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.folder import Checkpoint
from refimpl.checkpoint.gguf import FAMILY, NormedMatrix
from refimpl.errors import Remark
from refimpl.gguf_files import read_gguf

gguf = pytest.importorskip("gguf")
PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"
IDS = np.arange(12) * 7 % 96
RUNS_ALIBI = {"num_hidden_layers": 40, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}


def checkpoint(folder, family, **changes) -> Checkpoint:
    changes = {**(RUNS_ALIBI if family.endswith("13B") else {}), **changes}
    return Checkpoint.read(write_checkpoint(folder, family, **changes))


@pytest.mark.parametrize("recipe", [None, "q4_0", "q8_0", {"lm_head": "q8_0", "*.down_proj": "q4_1", "*": "mxfp4"}])
def test_a_model_comes_back_as_it_was(tmp_path, family, recipe):
    source = checkpoint(tmp_path / "source", family)
    assert write_gguf(source, tmp_path / "m.gguf", recipe) == (tmp_path / "m.gguf").stat().st_size
    model, again = refimpl.load(source.folder), refimpl.load(tmp_path / "m.gguf")
    expected = model if recipe is None else model.quantize(recipe)
    assert again.config.family == family and not again.config.norm_head
    np.testing.assert_array_equal(again(IDS), expected(IDS))


def test_the_bits_of_floats_stay(tmp_path):
    """bfloat16 stays bfloat16; the head, whose rows were divided, does not fit it any more."""
    model = refimpl.load()
    write_gguf(Checkpoint.read(model.folder), tmp_path / "m.gguf")
    again = refimpl.load(tmp_path / "m.gguf")
    np.testing.assert_array_equal(again(PROMPT), model(PROMPT))
    kinds = {name: one.kind for name, one in read_gguf(tmp_path / "m.gguf").tensors.items()}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_norm.weight"], kinds["output.weight"]) == (
        "bf16", "f32", "f32")  # fmt: skip
    assert again.tokenizer.decode(list(again.generate(PROMPT, max_new_tokens=4))).split("\n")[0] == "李商隐"


# What llama.cpp adds by rounding activations, of the largest logit: to 8 bits in blocks of 32 for q4_0, q8_0 and mxfp4
# (1/254 of a block's largest each, some tens of such errors a logit), of 256 for q4_k; to bfloat16 for its weights.
ROUNDING = {"bf16": 0.01, "q4_0": 0.03, "q8_0": 0.03, "mxfp4": 0.03, "q4_k": 0.06}


@pytest.mark.parametrize("kind", ROUNDING)
def test_llama_cpp_computes_the_same(tmp_path, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = refimpl.load()
    write_gguf(Checkpoint.read(model.folder), tmp_path / "m.gguf", None if kind == "bf16" else kind)
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    ids = model.token_ids(PROMPT)[0].tolist()
    assert engine.tokenize(PROMPT.encode(), add_bos=False, special=False) == ids, "its tokenizer is in the file"
    engine.eval(ids)
    theirs = np.array(engine.scores[: len(ids)])
    ours = (model if kind == "bf16" else model.quantize(kind))(ids)[0]
    assert np.abs(theirs - ours).max() < ROUNDING[kind] * np.abs(ours).max()
    plain = model.quantize(kind)(ids)[0] if kind != "bf16" else ours
    assert (theirs.argmax(-1) == plain.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("family", ["Baichuan2-13B", "Qwen2-7B", "Baichuan-7B"])
def test_llama_cpp_computes_other_families(tmp_path, family):
    llama_cpp = pytest.importorskip("llama_cpp")
    write_gguf(checkpoint(tmp_path / "source", family), tmp_path / "m.gguf")
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    engine.eval(IDS.tolist())
    ours = refimpl.load(tmp_path / "m.gguf")(IDS)[0]
    error = np.abs(np.array(engine.scores[: len(IDS)]) - ours).max() / np.abs(ours).max()
    assert error < 2e-3, "float32 weights; its cache of keys and values is float16, with errors of 5e-4"


def test_the_head_that_llama_cpp_s_converter_left_as_it_was_is_normalised(tmp_path):
    source = checkpoint(tmp_path / "source", "Baichuan2-7B")
    write_gguf(source, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf", "r+")
    head = next(one for one in reader.tensors if one.name == "output.weight")
    head.data[:] *= np.linspace(0.5, 2, len(head.data), dtype=np.float32)[:, None]
    reader.data.flush()
    raw = (tmp_path / "m.gguf").read_bytes().replace(b"refimpl.lm_head_normalized", b"refimpl.lm_head_xxxxxxxxxx")
    (tmp_path / "forgot.gguf").write_bytes(raw)
    with pytest.warns(Remark, match="forgot NormHead"):
        model = refimpl.load(tmp_path / "forgot.gguf")
    assert isinstance(model.weights["lm_head.weight"], NormedMatrix) and model.config.norm_head
    np.testing.assert_allclose(model(IDS), refimpl.load(source.folder)(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["q5_0", "q5_1", "q6_k", "q5_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs", "tq2_0"])
def test_every_kind_reads_as_the_engine_reads_it(tmp_path, kind):
    """Bytes of a file, changed to random ones of another kind: W_pack's parts, and rows that are put back in order."""
    from refimpl.checkpoint.gguf import GGUFMatrix, Piece, dequantize
    from refimpl.gguf_files import KINDS, Stored

    number, size = next((n, k) for n, k in KINDS.items() if k.name == kind)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (16, 512 // size.weights * size.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number))
        np.testing.assert_array_equal(dequantize(raw, kind), theirs)
        stored = Stored((16, 512), kind, raw)
        matrix = GGUFMatrix((Piece(stored, 2), Piece(stored)))
        order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
        expected = np.concatenate([theirs[order], theirs])
        np.testing.assert_array_equal(matrix.read(np.dtype(np.float32)), expected)
        np.testing.assert_array_equal(matrix.read(np.dtype(np.float32), np.array([20, 1])), expected[[20, 1]])


def test_the_command_line(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "source", "Baichuan2-7B")
    assert cli.main(["convert", str(folder), "--out", str(tmp_path / "m.gguf")]) == 0
    assert cli.main(["quantize", str(folder), "--out", str(tmp_path / "q.gguf"), "--format", "q4_0"]) == 0
    capsys.readouterr()
    assert cli.main(["info", str(tmp_path / "q.gguf")]) == 0
    said = capsys.readouterr().out
    assert "Baichuan2-7B" in said and "q4_0" in said
    assert cli.main(["quantize", str(folder), "--out", str(tmp_path / "q.gguf"), "--format", "q4_0"]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["quantize", str(folder), "--out", str(tmp_path / "n.gguf"), "--format", "nf4"]) == 2
    assert "which GGUF does not have; q4_0" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "q.gguf", "source"]


def test_a_model_from_a_gguf_file_is_not_saved_as_a_folder(tmp_path):
    write_gguf(checkpoint(tmp_path / "source", "Baichuan2-7B"), tmp_path / "m.gguf")
    model = refimpl.load(tmp_path / "m.gguf")
    for save in (model.save, model.quantize("q4_0").save, lambda out: convert(tmp_path / "m.gguf", out)):
        with pytest.raises(InputError, match=r"m\.gguf"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_does_not_run_is_not_written(tmp_path):
    source = Checkpoint.read(write_checkpoint(tmp_path / "source", "Baichuan2-13B"))
    with pytest.raises(InputError, match="ALiBi in a Baichuan of 40 layers alone, this one has 2"):
        write_gguf(source, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="row length 48 is not a multiple of block_size 32"):
        write_gguf(checkpoint(tmp_path / "odd", "Baichuan2-7B", hidden_size=48), tmp_path / "m.gguf", "q4_0")
    assert not list(tmp_path.glob("*m.gguf*"))


def changed(path, old: bytes, new: bytes):
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


@pytest.mark.parametrize(
    "old, new, said",
    [
        (b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0falco", "architecture 'falco'"),
        (b"llama.block_count", b"llama.block_xxxxx", "lacks llama.block_count"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", "lacks blk.1.ffn_up.weight and has unknown blk.1.ffn_xx"),
        (FAMILY.encode(), b"refimpl.xxxxxx", "is a llama of 2 layers and 96 words"),
        (b"Baichuan2-7B", b"Baichuan3-7B", "'Baichuan3-7B', expected one of"),
    ],
)  # fmt: skip
def test_other_models_are_refused(tmp_path, old, new, said):
    write_gguf(checkpoint(tmp_path / "source", "Baichuan2-7B"), tmp_path / "m.gguf")
    with pytest.raises(InputError, match=said):
        refimpl.load(changed(tmp_path / "m.gguf", old, new))
