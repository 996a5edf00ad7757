"""Folders as people have them: files that are not what they look like, and files of other tools beside the weights."""

import json
import struct

import numpy as np
import pytest
from conftest import write_checkpoint
from safetensors.numpy import load_file, save_file
from torch_bytes import state_dict

import refimpl
from refimpl import InputError
from refimpl.checkpoint.convert import convert
from refimpl.errors import Remark
from refimpl.files import read_json, read_small
from refimpl.info import examine
from refimpl.text.chat import ChatSettings, lay_out_qwen2
from refimpl.text.templates import QWEN2

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


def write_adapter(folder, seed=0):
    """A LoRA adapter of the first layer's W_pack."""
    rng = np.random.default_rng(seed)
    at = "base_model.model.model.layers.0.self_attn.W_pack"
    pair = {f"{at}.lora_A.weight": rng.standard_normal((2, 64)), f"{at}.lora_B.weight": rng.standard_normal((192, 2))}
    folder.mkdir(exist_ok=True)
    save_file({name: array.astype(np.float32) for name, array in pair.items()}, folder / "adapter_model.safetensors")
    keys = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["W_pack"], "layers_to_transform": [0]}
    (folder / "adapter_config.json").write_text(json.dumps(keys))


def test_an_adapter_beside_the_weights(tmp_path, folder):
    """transformers applies it, so whoever loads the folder here must know that we do not."""
    plain = load_file(folder / "model.safetensors")
    write_adapter(folder)
    with pytest.warns(Remark, match=r"a LoRA adapter lies beside the weights.*merge it: refimpl convert"):
        refimpl.load(folder)
    assert any("LoRA adapter lies beside" in remark for remark in examine(folder)["remarks"])
    with pytest.warns(Remark, match="It is not applied"):
        convert(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*")), "half an adapter would be worse than none"
    refimpl.load(tmp_path / "out")
    convert(folder, tmp_path / "merged", lora=folder)  # what the remark says to do, without a remark
    name = "model.layers.0.self_attn.W_pack.weight"
    assert not np.array_equal(load_file(tmp_path / "merged" / "model.safetensors")[name], plain[name])
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_an_adapter_given_as_a_model(tmp_path):
    write_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is a LoRA adapter, not a model; .*--lora .*adapter --out NEW"):
        refimpl.load(tmp_path / "adapter")
    with pytest.raises(InputError, match="is a LoRA adapter, not a model"):
        examine(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model-q4_0.gguf", "llama.cpp's; give the file itself"),
        ("adapter_model.bin", "a LoRA adapter's; merge it into its model"),
        ("baichuan2.om", "compiled for Huawei's Ascend"),
        ("baichuan2.ckpt", "MindSpore"),
        ("mp_rank_00_model_states.pt", "DeepSpeed's own; run its zero_to_fp32.py"),
        ("consolidated.00.pth", "rename it to pytorch_model.bin"),
        ("weights.safetensors", "rename it to model.safetensors"),
        ("notes.txt", "expected weights"),
    ],
)
def test_a_model_in_another_form(folder, file, message):
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(InputError, match=f"holds neither .*{message}"):
        refimpl.load(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_folder_of_gptq_or_awq(folder, method):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.W_pack.weight"
    del tensors[name]
    tensors[name.replace(".weight", ".qweight")] = np.zeros((8, 24), np.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"W_pack.qweight is of GPTQ or AWQ.* refimpl quantize it"):
        refimpl.load(folder)
    keys = json.loads((folder / "config.json").read_text())
    keys["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(InputError, match=f"quantized by {method.upper()} .4 bits, groups of 128., which is not read"):
        refimpl.load(folder)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_stubs_of_zero_3(folder, layout):
    stubs = {name: np.zeros(0, np.float32) for name in load_file(folder / "model.safetensors")}
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(state_dict(stubs))
    else:
        save_file(stubs, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"other tensors have no numbers.*ZeRO stage 3.*zero_to_fp32\.py"):
        refimpl.load(folder)


def test_tensors_saved_on_an_ascend(folder):
    (folder / "model.safetensors").unlink()
    pickle = b"\x80\x02}q\x00ctorch_npu.utils.storage\n_rebuild_npu_tensor\n."
    from refimpl.checkpoint.pickles import read_pickle

    with pytest.raises(InputError, match="saved on a Huawei Ascend NPU; save them there once more, moved to"):
        read_pickle(pickle, 0, {}, lambda id: id)


def test_split_q_k_v_under_a_baichuan_s_config(folder):
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        for module, rows in zip("qkv", np.split(tensors.pop(f"{at}W_pack.weight"), 3), strict=True):
            tensors[f"{at}{module}_proj.weight"] = rows.copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"q_proj, k_proj and v_proj where a Baichuan has W_pack.* join them"):
        refimpl.load(folder)


OWN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[bot] "


@pytest.mark.parametrize("family", ["Qwen2-7B", "Baichuan2-7B"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"])
def test_a_chat_template_of_the_folder_s_own(tmp_path, family, file):
    """A fine-tuned model's conversations may have another layout; who chats with it must know that ours is used."""
    folder = write_checkpoint(tmp_path / "model", family)
    refimpl.load(folder)  # no template, no remark
    (folder / file).write_text(OWN if file.endswith("jinja") else json.dumps({"chat_template": OWN}))
    with pytest.warns(Remark, match=f"{file} has a chat template of its own, which is not applied.*apply_chat"):
        refimpl.load(folder)
    assert any("chat template of its own" in remark for remark in examine(folder)["remarks"])
    if family == "Qwen2-7B":
        official = {"chat_template": QWEN2}
        (folder / file).write_text(QWEN2 if file.endswith("jinja") else json.dumps(official))
        refimpl.load(folder)
        qwen25 = QWEN2.replace("You are a helpful", "You are Qwen, created by Alibaba Cloud. You are a helpful")
        (folder / file).write_text(qwen25 if file.endswith("jinja") else json.dumps({"chat_template": qwen25}))
        with pytest.warns(Remark, match="chat template of its own"):
            refimpl.load(folder)


def test_the_official_template_gives_our_layout():
    """So it is no remark that is left out, but a difference that is not there."""
    jinja2 = pytest.importorskip("jinja2")
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so")]
    messages = [{"role": role, "content": text} for role, text in turns]
    for said in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        text = jinja2.Template(QWEN2, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).render(
            messages=said, add_generation_prompt=True
        )
        letters = lambda text: list(map(ord, text))
        settings = ChatSettings(user_token_id=1 << 20, assistant_token_id=1 << 20, eos_token_id=1 << 19)
        marks = {1 << 20: "<|im_start|>", 1 << 19: "<|im_end|>"}
        assert "".join(marks.get(id) or chr(id) for id in lay_out_qwen2(said, letters, settings)) == text


PREFIXES = ["module.", "_orig_mod.", "base_model.model.", "model.", "_forward_module.", "module._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_names_that_a_wrapper_has_changed(tmp_path, folder, prefix, layout):
    tensors = load_file(folder / "model.safetensors")
    expected = refimpl.load(folder)([5, 6, 7])
    wrapped = {prefix + name: array for name, array in tensors.items()}
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(state_dict(wrapped))
    else:
        save_file(wrapped, folder / "model.safetensors")
    with pytest.warns(Remark, match="from a wrapper of the model; it is removed"):
        assert np.array_equal(refimpl.load(folder)([5, 6, 7]), expected)
    assert "from a wrapper" in examine(folder)["remarks"][0]
    with pytest.warns(Remark, match=r"had .*\. in them"):
        convert(folder, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tensors)


def test_a_wrapper_inside_of_names(folder):
    tensors = load_file(folder / "model.safetensors")
    inside = {name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): array for name, array in tensors.items()}
    save_file(inside, folder / "model.safetensors")
    with pytest.warns(Remark, match="_fsdp_wrapped_module"):
        assert set(refimpl.load(folder).weights) == set(tensors)


def test_a_prefix_that_not_all_names_have_stays(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["module.model.embed_tokens.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"has unknown module\.model\.embed_tokens"):
        refimpl.load(folder)


def test_an_adapter_among_the_weights(folder):
    tensors = {f"base_model.model.{name}": array for name, array in load_file(folder / "model.safetensors").items()}
    at = "base_model.model.model.layers.0.self_attn.W_pack.lora_A.default.weight"
    save_file({**tensors, at: np.zeros((2, 64), np.float32)}, folder / "model.safetensors")
    with pytest.warns(Remark), pytest.raises(InputError, match=r"an adapter that is not merged.*merge_and_unload"):
        refimpl.load(folder)


@pytest.mark.parametrize("key", ["state_dict", "module", "model", "model_state_dict"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_save_with_torch(folder, key, protocol, zipped):
    torch = pytest.importorskip("torch")
    from collections import OrderedDict

    expected = refimpl.load(folder)([5, 6, 7])
    tensors = OrderedDict((n, torch.tensor(a)) for n, a in load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    for content in (tensors, {key: tensors, "epoch": 3, "optimizer": None, "lr": 1e-4}):
        with open(folder / "pytorch_model.bin", "wb") as file:
            torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        assert np.array_equal(refimpl.load(folder)([5, 6, 7]), expected)
