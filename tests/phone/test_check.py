"""A bundle with one fault each: the fault is found, and nothing beside it."""

import json
import shutil
from pathlib import Path

import pytest

from export.phone.bundle import bundle
from export.phone.check import check_bundle
from refimpl import InputError
from refimpl.cli import main
from refimpl.model import EMBEDDED

pytest.importorskip("onnxruntime_qnn")


@pytest.fixture(scope="module")
def bundled(coded_export, desk_binaries, tmp_path_factory) -> Path:
    return bundle(EMBEDDED, coded_export, tmp_path_factory.mktemp("check") / "bundle", compiled=desk_binaries)


def edited(folder: Path, name: str, path: str, value) -> None:
    """Sets a value in a JSON file, by dotted path; None takes it out."""
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    inner, *keys = content, *path.split(".")
    for key in keys[:-1]:
        inner = inner[int(key) if key.isdigit() else key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


GENIE, HTP = "genie_config.json", "dialog.engine.backend.QnnHtp"
FAULTS = {  # file, what is changed -> the rules that find it
    "theta": (GENIE, f"{HTP}.rope-theta", 1_000_000, ["rope-theta"]),
    "kv-dim": (GENIE, f"{HTP}.kv-dim", 128, ["kv-dim", "kv-dim"]),  # against config.json and the graphs
    "half": (GENIE, f"{HTP}.pos-id-dim", 64, ["pos-id-dim"]),
    "words": (GENIE, "dialog.context.n-vocab", 64000, ["n-vocab", "n-vocab"]),
    "few words": (GENIE, "dialog.context.n-vocab", 10, ["n-vocab", "n-vocab", "tokenizer"]),
    "short": (GENIE, "dialog.context.size", 32, ["context-size"]),
    "long": (GENIE, "dialog.context.size", 4096, ["context-size"]),
    "bos": (GENIE, "dialog.context.bos-token", 1, ["bos"]),
    "eos": (GENIE, "dialog.context.eos-token", 5, ["eos"]),
    "no such eos": (GENIE, "dialog.context.eos-token", 3600, ["eos", "tokenizer"]),
    "a part": (GENIE, "dialog.engine.model.binary.ctx-bins",
               ["prompt_ar16_cl64_1_of_2.bin", "token_ar1_cl64_1_of_2.bin"], ["part-missing", "part-missing"]),
    "file": (GENIE, "dialog.tokenizer.path", "nowhere.json", ["file-missing"]),
    "pair": ("htp_backend_ext_config.json", "devices.0.dsp_arch", "v75", ["soc"]),
    "soc": ("htp_backend_ext_config.json", "devices.0.soc_model", 57, ["soc"] * 5),  # the pair, and each binary
    "model": ("config.json", "num_hidden_layers", 4, ["part-missing"]),
    "tokenizer": ("tokenizer.json", "model.vocab.</s>", 7, ["tokenizer", "tokenizer"]),  # and no eos
}  # fmt: skip


def test_a_bundle_of_ours_has_no_fault(bundled):
    found = check_bundle(bundled)
    assert found and found.remarks == () and str(found).startswith("nothing wrong found in")


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_found_by_its_rule(fault, bundled, tmp_path):
    folder = Path(shutil.copytree(bundled, tmp_path / "bundle"))
    name, path, value, rules = FAULTS[fault]
    edited(folder, name, path, value)
    if fault == "tokenizer":  # added tokens would say the right id again
        edited(folder, name, "added_tokens", [])
    found = check_bundle(folder, ask_genie=False)
    assert [one.rule for one in found.faults] == rules, str(found)
    assert not found and all(one.why and one.remedy for one in found.faults)


def test_grids_that_genie_takes_without_a_word(bundled, monkeypatch):
    """Of binaries that say other grids than ours do."""
    from dataclasses import replace

    import export.phone.check as check

    real = check.read_binary

    def with_grids(**grids):
        def changed(tensor):
            scale, zero_point = grids.get(tensor.name, (tensor.scale, tensor.zero_point))
            return replace(tensor, scale=scale, zero_point=zero_point)

        def read(path):
            binary = real(path)
            graphs = [
                replace(g, inputs=tuple(map(changed, g.inputs)), outputs=tuple(map(changed, g.outputs)))
                for g in binary.graphs
            ]
            return replace(binary, graphs=tuple(graphs))

        monkeypatch.setattr(check, "read_binary", read)
        return [one.rule for one in check_bundle(bundled, ask_genie=False).faults]

    assert with_grids(attention_mask=(5 / 65535, 65535)) == ["mask-scale"]
    assert with_grids(attention_mask=(100 / 65535, 32768)) == ["mask-scale"]
    assert with_grids(position_ids_cos=(0.5 / 32768, 32768)) == ["rotary-scale"]
    assert with_grids(past_key_0_in=(0.5, 128)) == ["kv-untied"]
    assert with_grids(past_key_0_in=(0.5, 100), past_key_0_out=(0.5, 100)) == ["kv-zero-point"]


def test_genie_is_asked(bundled, tmp_path):
    folder = Path(shutil.copytree(bundled, tmp_path / "bundle"))
    edited(folder, GENIE, "dialog.nonsense", 1)
    (fault,) = check_bundle(folder).faults
    assert fault.rule == "refused" and "additional property 'nonsense'" in fault.why


def test_without_the_library_the_rules_say_what_they_can(bundled, tmp_path, monkeypatch):
    def missing(name):
        raise InputError("onnxruntime-qnn is not installed; pip install 'refimpl[htp]'")

    monkeypatch.setattr("export.phone.check.library", missing)
    folder = Path(shutil.copytree(bundled, tmp_path / "bundle"))
    found = check_bundle(folder)
    assert found and found.remarks[0].startswith("the binaries were not read, and Genie was not asked: onnxruntime-qnn")
    edited(folder, GENIE, "dialog.context.bos-token", 1)
    (folder / "token_ar1_cl64_1_of_2.bin").unlink()
    assert [fault.rule for fault in check_bundle(folder).faults] == ["file-missing", "bos"]


@pytest.mark.parametrize(("fault", "said"), [("soc", "it is made for 8-elite"), ("damaged", "reads no context binary")])
def test_genie_is_not_run_over_a_bundle_that_it_cannot_load(fault, said, bundled, tmp_path, capsys):
    folder = Path(shutil.copytree(bundled, tmp_path / "bundle"))
    if fault == "soc":
        edited(folder, "htp_backend_ext_config.json", "devices.0.soc_model", 57)
        edited(folder, "htp_backend_ext_config.json", "devices.0.dsp_arch", "v75")
    else:
        (folder / "token_ar1_cl64_1_of_2.bin").write_bytes(b"damaged")
    assert main(["genie", "-p", "白", "--bundle", str(folder)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_fault_that_genie_accepts_is_told_with_its_answer(bundled, tmp_path, capsys):
    folder = Path(shutil.copytree(bundled, tmp_path / "bundle"))
    edited(folder, GENIE, f"{HTP}.rope-theta", 1_000_000)
    assert main(["genie", "-p", "白", "--max-new-tokens", "1", "--bundle", str(folder)]) == 1
    assert "the bundle has a fault that Genie accepts: rope-theta: " in capsys.readouterr().out


def test_bad_folders_are_one_line(bundled, tmp_path, capsys):
    for folder, why in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "genie_config.json")):
        with pytest.raises(InputError, match=why) as caught:
            check_bundle(folder)
        assert "\n" not in str(caught.value)
    folder = Path(shutil.copytree(bundled, tmp_path / "bundle"))
    binary = folder / "token_ar1_cl64_1_of_2.bin"
    binary.write_bytes(b"damaged")
    assert main(["bundle", "--check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "binary-damaged: token_ar1_cl64_1_of_2.bin: " in said and "1 fault found in" in said
    assert main(["bundle", "--check", str(tmp_path / "nowhere")]) == 2
    assert main(["bundle"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
