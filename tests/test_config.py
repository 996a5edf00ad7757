"""The official config.json files, and what no config.json may bring about."""

import json

import pytest
from conftest import config_keys

from refimpl import InputError
from refimpl.config import Config, config_from_keys, doubt

BAICHUAN = {
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "model_type": "baichuan",
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
SIZE_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
SIZE_13B = {"hidden_size": 5120, "intermediate_size": 13696, "num_attention_heads": 40, "num_hidden_layers": 40}
SECOND = {
    "_from_model_config": True, "architectures": ["BaichuanForCausalLM"], "tokenizer_class": "BaichuanTokenizer",
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.29.2", "vocab_size": 125696,
}  # fmt: skip
FOUR_BITS = {
    "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
# As transformers 5 saves the same model.
QWEN2_V5 = {
    **{k: v for k, v in QWEN2.items() if k not in ("rope_theta", "torch_dtype", "sliding_window")},
    "dtype": "bfloat16", "sliding_window": None, "layer_types": ["full_attention"] * 28, "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "transformers_version": "5.0.0",
}  # fmt: skip
OFFICIAL = {
    "Baichuan-7B": ("Baichuan-7B", {
        **BAICHUAN, **SIZE_7B, "architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 4096,
        "auto_map": {"AutoConfig": "configuration_baichuan.BaiChuanConfig"}, "torch_dtype": "float16",
        "transformers_version": "4.29.1", "vocab_size": 64000,
    }),
    "Baichuan-13B-Chat": ("Baichuan-13B", {
        **BAICHUAN, **SIZE_13B, "_from_model_config": True, "architectures": ["BaichuanForCausalLM"],
        "gradient_checkpointing": False, "model_max_length": 4096, "torch_dtype": "bfloat16",
        "transformers_version": "4.29.2", "vocab_size": 64000,
    }),
    "Baichuan2-7B-Chat": ("Baichuan2-7B", {
        **BAICHUAN, **SIZE_7B, **SECOND, "max_position_embeddings": 4096, "model_max_length": 4096,
    }),
    "Baichuan2-13B-Chat": ("Baichuan2-13B", {
        **BAICHUAN, **SIZE_13B, **SECOND, "gradient_checkpointing": False, "model_max_length": 4096,
    }),
    "Baichuan2-13B-Chat-4bits": ("Baichuan2-13B", {
        **BAICHUAN, **SIZE_13B, **SECOND, "model_max_length": 4096, "quantization_config": FOUR_BITS,
    }),
    "Qwen2-7B-Instruct": ("Qwen2-7B", QWEN2),
    "Qwen2-7B-Instruct, saved by transformers 5": ("Qwen2-7B", QWEN2_V5),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configs_are_understood(name):
    family, keys = OFFICIAL[name]
    config = config_from_keys(json.loads(json.dumps(keys)))
    assert config.family == family and config.head_dim == 128
    assert config.alibi == family.endswith("13B") and config.norm_head == family.startswith("Baichuan2")
    assert config.rope_theta == (None if config.alibi else 1e6 if family == "Qwen2-7B" else 1e4)
    assert config.num_key_value_heads == (4 if family == "Qwen2-7B" else config.num_attention_heads)
    assert config.quantized == name.endswith("4bits")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Baichuan2-7B", {"norm_head": False}, "unknown keys norm_head"),
        ("Baichuan2-7B", {"qkv_packed": False}, "unknown keys qkv_packed"),
        ("Baichuan2-7B", {"num_key_value_heads": 2}, "is it a Qwen2"),
        ("Baichuan2-7B", {"hidden_size": 5120}, "13B, ALiBi"),
        ("Baichuan2-13B", {"hidden_size": 4096}, "7B, RoPE"),
        ("Baichuan2-7B", {"vocab_size": [1]}, r"vocab_size is \[1\]"),
        ("Baichuan2-7B", {"layer_types": 5}, "layer_types"),
        ("Baichuan2-7B", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("Baichuan2-7B", {"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ("Baichuan2-7B", {"num_hidden_layers": 1 << 18}, "num_hidden_layers is 262144"),
        ("Qwen2-7B", {"rope_theta": None}, "the key rope_theta is missing"),
        ("Qwen2-7B", {"rope_theta": 0}, "rope_theta is 0"),
        ("Qwen2-7B", {"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ("Qwen2-7B", {"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ("Qwen2-7B", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters"),
        ("Qwen2-7B", {"num_key_value_heads": None}, "the key num_key_value_heads is missing"),
    ],
)
def test_what_would_change_the_architecture_is_refused(family, changes, message):
    with pytest.raises(InputError, match=message):
        config_from_keys(config_keys(family, **changes))


def test_baichuan_s_theta_is_hard_coded():
    """As in the official code, whatever config.json says."""
    assert config_from_keys(config_keys("Baichuan2-7B", rope_theta=5e5)).rope_theta == 1e4


def test_a_family_is_one_of_five():
    with pytest.raises(InputError, match="the family is"):
        Config(family="\x1b[2J")


WITHOUT_CLASS = {key: value for key, value in SECOND.items() if key != "tokenizer_class"}
OF_THE_FIRST = {"architectures": ["BaiChuanForCausalLM"]}


@pytest.mark.parametrize(
    "keys, number, proven",
    [
        ({**WITHOUT_CLASS, "vocab_size": 125699, "z_loss_weight": 0, "max_position_embeddings": 4096}, 2, True),
        ({**WITHOUT_CLASS, "vocab_size": 125760, "max_position_embeddings": 4096}, 2, True),  # its class says so
        ({**WITHOUT_CLASS, "vocab_size": 125760, "model_max_length": 4096}, 2, False),
        ({**OF_THE_FIRST, "vocab_size": 64003, "tokenizer_class": "Any", "max_position_embeddings": 4096}, 1, True),
        ({"vocab_size": 64003, "tokenizer_class": "LlamaTokenizer", "model_max_length": 4096}, 1, False),
        ({"vocab_size": 64000, "tokenizer_class": "BaichuanTokenizer", "model_max_length": 4096}, 1, True),
        ({"vocab_size": 320, "tokenizer_class": "BaichuanTokenizer", "model_max_length": 256}, 2, False),
    ],
)  # fmt: skip
def test_words_that_were_added_do_not_make_another_generation(keys, number, proven):
    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    keys = {**BAICHUAN, **size, **keys}
    assert config_from_keys(keys).norm_head == (number == 2)
    said = doubt(keys)
    assert said is None if proven else f"taken for generation {number}: " in said


def test_what_qwen2_s_config_leaves_out_is_what_transformers_has():
    left_out = ("bos_token_id", "eos_token_id", "max_position_embeddings")
    config = config_from_keys({key: value for key, value in QWEN2.items() if key not in left_out})
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (None, None, 32768)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Config()
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.max_position_embeddings) == (None, None, 32768)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_mrope": False}, {"head_dim": 128}, {"pretraining_tp": 1}, {"partial_rotary_factor": 1.0},
        {"rope_scaling": {"type": "default"}}, {"rope_scaling": None}, {"attention_bias": True},
        {"use_sliding_window": True, "max_window_layers": 28}, {"num_labels": 2, "classifier_dropout": None},
        {"output_scores": False, "torchscript": False, "num_beams": 1, "tf_legacy_loss": False, "prefix": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1000000.0}},
        {"rope_theta": None,
         "rope_parameters": {"rope_theta": 1000000, "rope_type": "default", "partial_rotary_factor": 1.0}},
    ],
)  # fmt: skip
def test_keys_without_effect_change_nothing(changes):
    assert config_from_keys({**QWEN2, **changes}) == config_from_keys(QWEN2)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_mrope": True}, {"head_dim": 64}, {"pretraining_tp": 2}, {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"use_sliding_window": True, "max_window_layers": 21},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}},
    ],
)  # fmt: skip
def test_the_same_keys_with_an_effect_are_refused(changes):
    with pytest.raises(InputError, match=f"{next(iter(changes))}|partial_rotary_factor|unknown keys"):
        config_from_keys({**QWEN2, **changes})
