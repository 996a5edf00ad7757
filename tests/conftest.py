"""What tests of several packages stand on: the recorded goldens where they are, and small random checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import refimpl
from refimpl.checkpoint.resolve import expected_shapes
from refimpl.config import FAMILIES, config_from_keys

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded goldens and tiny checkpoints that lies beside a developer's checkout."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the recorded goldens are not beside this checkout")
    return SHARED


def config_keys(family: str, **changes) -> dict:
    """A small `config.json` of a family, with the keys by which the official ones are told apart."""
    spelled = "BaiChuan" if family == "Baichuan-7B" else "Baichuan"
    keys = {
        "model_type": "baichuan", "architectures": [f"{spelled}ForCausalLM"],
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "max_position_embeddings": 64, "torch_dtype": "float32",
    }  # fmt: skip
    if family.startswith("Baichuan2"):
        keys["z_loss_weight"] = 0.0
    if family.endswith("13B"):
        keys["model_max_length"] = keys.pop("max_position_embeddings")
    if family == "Qwen2-7B":
        keys.update(model_type="qwen2", num_key_value_heads=2, rope_theta=1e6)
    return {**keys, **changes}


def write_checkpoint(folder: Path, family: str, seed: int = 0, dtype=np.float32, **changes) -> Path:
    """A random checkpoint of a family in `folder`: weights of the size that keeps a residual stream alive."""
    keys = config_keys(family, **changes)
    config = config_from_keys(keys)
    rng = np.random.default_rng(seed)

    def values(name, shape):
        if name.endswith("norm.weight"):
            return 1 + 0.1 * rng.standard_normal(shape)
        return rng.standard_normal(shape) * (1.15 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.1)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    tensors = {name: values(name, shape).astype(dtype) for name, shape in expected_shapes(config).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Each of the five families in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """family -> the folder of a small random checkpoint of it, made once a session."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = write_checkpoint(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.fixture
def tiny_model(tiny_folder):
    """family -> a small random model of it."""
    return lambda family: refimpl.load(tiny_folder(family))


# The embedded model as Qualcomm's compiler and Genie take it.


@pytest.fixture(scope="session")
def coded_export(tmp_path_factory) -> Path:
    """The embedded model with codes at its border: two parts, 16 tokens and 1 at a time, a context of 64."""
    from export import emit
    from refimpl.grids.calibrate import calibrate

    model = refimpl.load()
    text = (refimpl.model.EMBEDDED / "held_out.txt").read_text(encoding="utf-8")
    ids = np.array(model.tokenizer.encode(text)[:512]).reshape(-1, 64)
    folder = tmp_path_factory.mktemp("phone") / "export"
    forms = ["conv", "unpack", "heads", "scale-on-key", "rank4"]
    parts = emit(model, (16, 1), 64, 2, "qdq", forms=forms, encodings=calibrate(model, ids), border="codes")
    return parts.save(folder)


@pytest.fixture(scope="session")
def desk_binaries(coded_export, tmp_path_factory) -> Path:
    """One context binary for each graph, which the emulation runs."""
    pytest.importorskip("onnxruntime_qnn")
    from export.phone.compiler import compile_graphs

    return compile_graphs(coded_export, tmp_path_factory.mktemp("phone") / "bin", shared=False).folder


@pytest.fixture
def copied(coded_export, tmp_path) -> Path:
    """That export, to be damaged."""
    return Path(shutil.copytree(coded_export, tmp_path / "export"))
