"""The bundle: what Genie reads says of the model, its tokenizer and its graphs what they are."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import config_keys, write_checkpoint

from export import emit
from export.files.encodings import read_encodings
from export.phone.bundle import binaries, bundle, sample_prompt
from export.phone.metadata import as_yaml
from export.phone.settings import genie_config, htp_config
from refimpl import InputError, load
from refimpl.cli import main
from refimpl.config import Config, config_from_keys, read_config
from refimpl.model import EMBEDDED
from refimpl.text.tokenizer import load_tokenizer

QUESTION = "《静夜思》的作者是谁？"
FILES = {"config.json", "genie_config.json", "genie-app-script.txt", "htp_backend_ext_config.json", "metadata.json",
         "metadata.yaml", "sample_prompt.txt", "text-generator.json", "tokenizer.json", "tokenizer_config.json",
         "tool-versions.yaml"}  # fmt: skip


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """An export of the embedded model."""
    return emit(load(), (16, 1), 64, 4, "aihub").save(tmp_path_factory.mktemp("graphs") / "export")


@pytest.fixture(scope="module")
def bundled(graphs, tmp_path_factory):
    return bundle(EMBEDDED, graphs, tmp_path_factory.mktemp("bundle") / "genie")


@pytest.fixture
def checkpoint(tmp_path):
    """What the bundle reads of the embedded model, to be spoiled."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_bundle_has_its_files_and_nothing_else(bundled):
    assert {path.name for path in bundled.iterdir()} == FILES
    assert list(bundled.parent.iterdir()) == [bundled]
    assert read(bundled, "config.json") == read(EMBEDDED, "config.json")


def test_genie_config_is_qualcomms_of_baichuan2():
    """Keys and values of `configs/genie/baichuan2_7b.json` in AI Hub Apps 0.20, with those that 0.65 has added.

    But for bos-token, which is 1 there: Genie puts it before every prompt, and Baichuan's tokenizer does not.
    """
    bins = [f"weight_sharing_model_{i}_of_5.serialized.bin" for i in range(1, 6)]
    assert genie_config(Config(), 4096, bins, -1, 2) == {
        "dialog": {
            "version": 1, "type": "basic", "max-num-tokens": 2048,
            "context": {"version": 1, "size": 4096, "n-vocab": 125696, "bos-token": -1, "eos-token": 2},
            "sampler": {"version": 1, "seed": 42, "temp": 0.8, "top-k": 40, "top-p": 0.95},
            "tokenizer": {"version": 1, "path": "tokenizer.json"},
            "engine": {
                "version": 1, "n-threads": 3,
                "backend": {
                    "version": 1, "type": "QnnHtp",
                    "QnnHtp": {
                        "version": 1, "use-mmap": True, "spill-fill-bufsize": 0, "mmap-budget": 0, "poll": True,
                        "cpu-mask": "0xe0", "kv-dim": 128, "rope-theta": 10000, "pos-id-dim": 64,
                        "allow-async-init": False,
                    },
                    "extensions": "htp_backend_ext_config.json",
                },
                "model": {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": bins}},
            },
        }
    }  # fmt: skip


def test_genie_config_of_qwen2_has_the_numbers_of_qualcomms():
    keys = config_keys("Qwen2-7B", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064,
                       num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768)  # fmt: skip
    made = genie_config(config_from_keys(keys), 4096, ["1.bin"], -1, 151645)["dialog"]
    htp = made["engine"]["backend"]["QnnHtp"]
    assert made["context"] == {"version": 1, "size": 4096, "n-vocab": 152064, "bos-token": -1, "eos-token": 151645}
    assert (htp["rope-theta"], htp["kv-dim"], htp["pos-id-dim"]) == (1000000, 128, 64)
    assert json.dumps(htp["rope-theta"]) == "1000000"


def test_embedded_model_is_what_its_bundle_says(bundled):
    dialog = read(bundled, "genie_config.json")["dialog"]
    assert dialog["context"] == {"version": 1, "size": 64, "n-vocab": 3584, "bos-token": -1, "eos-token": 2}
    assert dialog["engine"]["backend"]["QnnHtp"]["kv-dim"] == 64
    assert binaries(bundled) == [f"baichuan2_7b_part_{i}_of_4.bin" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("soc, number, architecture", [("8-elite", 69, "v79"), ("8-gen-3", 57, "v75")])
def test_htp_config(soc, number, architecture):
    made = htp_config(soc)
    assert (made["devices"][0]["soc_model"], made["devices"][0]["dsp_arch"]) == (number, architecture)
    assert made["context"] == {"weight_sharing_enabled": True}


# Metadata.


def test_metadata_says_shapes_and_grids_of_every_end(bundled, graphs):
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load((bundled / "metadata.yaml").read_text(encoding="utf-8"))
    assert (said["precision"], said["runtime"]) == ("w4a16", "genie")
    manifest = read(graphs, "manifest.json")
    model = load()
    encodings = read_encodings(graphs / "encodings.json", model)
    assert set(said["components"]) == set(manifest["graphs"])
    quantized = 0
    for name, graph in manifest["graphs"].items():
        for way in ("inputs", "outputs"):
            ends = said["components"][name][way]
            assert list(ends) == [value["name"] for value in graph[way]]
            for value in graph[way]:
                end = ends[value["name"]]
                assert end["shape"] == value["shape"]
                if value["dtype"] == "int32":
                    assert end == {"shape": value["shape"], "dtype": "int32"}
                    continue
                kv = value["name"].startswith("past_")
                assert end["dtype"] == ("uint8" if kv else "uint16")
                quantized += 1
                if kv:
                    _, kind, layer, _ = value["name"].split("_")
                    grid = encodings[f"model.layers.{layer}.self_attn.{kind}"]
                    assert end["quantization_parameters"] == {"scale": float(grid.scale), "offset": -128}
    assert quantized > 40
    table = encodings["model.embed_tokens.weight"]
    for number in (1, 2):  # what a Gather gives stands on its table's grid, on both sides
        way = "outputs" if number == 1 else "inputs"
        end = next(iter(said["components"][f"token_ar1_cl64_{number}_of_4"][way].values()))
        assert end["quantization_parameters"] == {"scale": float(table.scale), "offset": int(table.offset)}


def test_metadata_of_float_graphs(tmp_path):
    exported = emit(load(), (4, 1), 16, 2, "plain").save(tmp_path / "export")
    text = (bundle(EMBEDDED, exported, tmp_path / "genie") / "metadata.yaml").read_text()
    assert text.startswith("precision: float\n") and "uint" not in text and "quantization" not in text


def test_yaml_is_read_as_it_was_meant():
    yaml = pytest.importorskip("yaml")
    numbers = {"b": 1e-05, "c": 1e16, "d": [1, -2, 3], "e": {}, "f": 0.1, "h": 2.5e-07, "_model_layers_0": -128}
    texts = {"no": "yes", "/x/y.z": "1", "1": None, "é: #": "a: b", "n": True, "t": "null", "empty": "", "l": []}
    content = {"a": numbers, **texts}
    assert yaml.safe_load(as_yaml(content)) == content


# The tokenizer and the prompt.


def test_prompt_becomes_the_ids_of_the_chat(bundled):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_file(str(bundled / "tokenizer.json"))
    text = (bundled / "sample_prompt.txt").read_text(encoding="utf-8")
    ids = made.encode(text, add_special_tokens=False).ids
    assert ids == load_tokenizer(EMBEDDED).chat([{"role": "user", "content": QUESTION}])
    assert (ids[0], ids[-1]) == (195, 196)


def test_official_tokenizer_gives_the_role_ids(shared, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from export.phone.bundle import tokenizer_files

    generation = {"user_token_id": 195, "assistant_token_id": 196}
    config = Config()
    made, settings, ids = tokenizer_files(shared / "tokenizers" / "baichuan2", config, generation)
    text = sample_prompt(config, settings, generation, made)
    assert ids == (-1, 2) and text == f"<reserved_106>{QUESTION}<reserved_107>"
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(made))
    official = load_tokenizer(shared / "tokenizers" / "baichuan2", config)
    assert tokenizer.encode(text).ids == official.chat([{"role": "user", "content": QUESTION}])


CONVERSATIONS = [
    [("user", "你好")],
    [("system", "你是一个翻译助手。"), ("user", "hello\n  world")],
    [("user", "问"), ("assistant", "答"), ("user", "it's 'quoted' {{x}} \\n")],
    [("user", "问"), ("assistant", "答")],
]


@pytest.mark.parametrize("said", CONVERSATIONS)
def test_chat_template_is_the_layout(said, bundled):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(bundled))
    messages = [{"role": role, "content": text} for role, text in said]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(ids) == load_tokenizer(EMBEDDED).chat(messages)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer("你好 hello")["input_ids"] == load_tokenizer(EMBEDDED).encode("你好 hello")


def test_chat_template_of_the_first_generation():
    jinja2 = pytest.importorskip("jinja2")
    from export.phone.bundle import _template

    template = jinja2.Template(_template(Config(family="Baichuan-7B"), "<U>", "<A>"))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert template.render(messages=turns) == "<U>q<A>a</s><A>"


def test_a_base_model_continues(checkpoint, graphs, tmp_path):
    (checkpoint / "generation_config.json").unlink()
    made = bundle(checkpoint, graphs, tmp_path / "genie")
    assert (made / "sample_prompt.txt").read_text(encoding="utf-8") == "登鹳雀楼->王之涣\n夜雨寄北->"
    assert "chat_template" not in read(made, "tokenizer_config.json")


# The other families.


def test_baichuan_7b(tmp_path):
    folder = write_checkpoint(tmp_path / "v1", "Baichuan-7B", vocab_size=3584)
    shutil.copyfile(EMBEDDED / "tokenizer.model", folder / "tokenizer.model")
    exported = emit(load(folder), (4, 1), 16, 2, "aihub").save(tmp_path / "export")
    made = bundle(folder, exported, tmp_path / "genie", bins=["build/a.bin", "b.bin"], soc="8-gen-3")
    dialog = read(made, "genie_config.json")["dialog"]
    assert dialog["context"] == {"version": 1, "size": 16, "n-vocab": 3584, "bos-token": -1, "eos-token": 2}
    assert binaries(made) == ["a.bin", "b.bin"]
    assert read(made, "htp_backend_ext_config.json")["devices"][0]["soc_model"] == 57


def test_qwen2_takes_the_tokenizer_that_is_there(tmp_path):
    folder = write_checkpoint(tmp_path / "qwen", "Qwen2-7B")
    exported = emit(load(folder), (4, 1), 16, 2, "aihub").save(tmp_path / "export")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = {"added_tokens": [{"id": 90 + i, "content": word, "special": True} for i, word in enumerate(words)]}
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": "{{ 'x' }}"}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content))
    made = bundle(folder, exported, tmp_path / "genie")
    context = read(made, "genie_config.json")["dialog"]["context"]
    assert (context["bos-token"], context["eos-token"], context["n-vocab"]) == (-1, 92, 96)
    assert read(made, "tokenizer.json") == tokenizer and read(made, "tokenizer_config.json") == settings
    assert (made / "sample_prompt.txt").read_text(encoding="utf-8") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|nobody|>"}}))
    with pytest.raises(InputError, match="names no eos_token"):
        bundle(folder, exported, tmp_path / "again")


@pytest.mark.parametrize("family", ["Baichuan-13B", "Baichuan2-13B"])
def test_alibi_is_refused_in_one_line(family, tmp_path):
    folder = write_checkpoint(tmp_path / "model", family)
    with pytest.raises(
        InputError, match="has ALiBi, a bias for each head, and Genie feeds one mask for all heads"
    ) as caught:
        bundle(folder, tmp_path / "graphs", tmp_path / "genie")
    assert "\n" not in str(caught.value)


# What is not as it should be.


def refused(why, *arguments, **keywords):
    with pytest.raises(InputError, match=why) as caught:
        bundle(*arguments, **keywords)
    assert "\n" not in str(caught.value)


def test_graphs_of_another_model_are_refused(graphs, tiny_folder, tmp_path, checkpoint):
    out = tmp_path / "genie"
    cases = [
        ("num_hidden_layers", 4, "has 3 layers, the model 4"),
        ("num_attention_heads", 8, r"has the shape \(4, 1, 64, 48\), the model 8 heads of 32"),
        ("vocab_size", 3600, r"gives logits of shape \(1, 16, 3584\), the model has 3600"),
    ]
    for key, value, why in cases:
        keys = read(EMBEDDED, "config.json")
        (checkpoint / "config.json").write_text(json.dumps({**keys, key: value}))
        refused(why, checkpoint, graphs, out)
    assert not out.exists()


def test_graphs_that_are_not_whole_are_refused(graphs, tmp_path):
    folder, out = Path(shutil.copytree(graphs, tmp_path / "export")), tmp_path / "genie"
    path = folder / "token_ar1_cl64_2_of_4" / "model.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    refused("model.onnx is not an ONNX model", EMBEDDED, folder, out)
    path.write_bytes(data)
    path.parent.rename(folder / "second")
    refused(r"second is not called \{prompt", EMBEDDED, folder, out)
    shutil.rmtree(folder / "second")
    refused("has parts 1, 3, 4 of 4 with 1 tokens at a time and a context of 64", EMBEDDED, folder, out)
    refused("is not a folder", EMBEDDED, tmp_path / "nowhere", out)
    assert not out.exists()


def test_other_bad_input_is_refused(graphs, tmp_path, checkpoint):
    out = tmp_path / "genie"
    refused("soc is '9'", EMBEDDED, graphs, out, soc="9")
    refused("2 different names of binaries for 4 parts", EMBEDDED, graphs, out, bins=["a", "b"])
    refused("2 different names of binaries for 4 parts", EMBEDDED, graphs, out, bins=["a", "b", "x/a"])
    for user, assistant in ((195, None), (1, 2), ([195], 196), (5, 6)):
        content = {"user_token_id": user, "assistant_token_id": assistant}
        (checkpoint / "generation_config.json").write_text(json.dumps(content))
        refused("expected those of pieces such as <reserved_106>", checkpoint, graphs, out)
    (checkpoint / "tokenizer.model").write_bytes(b"")
    refused("0 pieces", checkpoint, graphs, out)
    (checkpoint / "tokenizer.model").unlink()
    refused("tokenizer.model", checkpoint, graphs, out)
    out.mkdir()
    (out / "file").write_text("")
    refused("is not empty", EMBEDDED, graphs, out)
    refused("is not empty", EMBEDDED, graphs, out / "file")


def test_a_full_disk_leaves_nothing(graphs, tmp_path, monkeypatch):
    written = []

    def write_text(self, text, **keywords):
        written.append(self)
        if len(written) == 3:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", write_text)
    refused("No space left on device", EMBEDDED, graphs, tmp_path / "genie")
    assert len(written) == 3 and list(tmp_path.iterdir()) == []


def test_command(graphs, tmp_path, capsys):
    out = str(tmp_path / "genie")
    assert main(["bundle", "--graphs", str(graphs), "--out", out]) == 0
    said = capsys.readouterr().out
    assert "put baichuan2_7b_part_1_of_4.bin, " in said and "genie-t2t-run -c genie_config.json" in said
    assert main(["bundle", "--graphs", str(graphs), "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert read_config(Path(out)) == read_config(EMBEDDED)
