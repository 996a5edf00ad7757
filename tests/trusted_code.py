"""Checkpoints with modeling code of their own beside them, which PyTorch executes once it is trusted."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import write_checkpoint

CODE = Path(__file__).parent / "make" / "remote_code"


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    """transformers imports trusted code from a copy; let that be a temporary one."""
    import transformers.dynamic_module_utils as at

    monkeypatch.setattr(at, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def with_code(folder: Path, family: str, **changes) -> Path:
    """A checkpoint with modeling code beside it."""
    keys = {"AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"}  # fmt: skip
    write_checkpoint(folder, family, auto_map=keys, tie_word_embeddings=False, **changes)
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        shutil.copy(CODE / name, folder / name)
    return folder
