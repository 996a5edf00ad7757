"""Fine-tuning: the official data format, resumed runs, workers, adapters, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_checkpoint
from safetensors.numpy import load_file

import refimpl
from refimpl import InputError
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.weights import Weight
from refimpl.cli import main
from refimpl.gradients import finetune as at
from refimpl.gradients.adapters import Lora
from refimpl.gradients.data import Example, read_examples
from refimpl.gradients.finetune import Options, Tuning, finetune, order
from refimpl.gradients.optimizer import AdamW
from refimpl.loss import loss
from refimpl.sweep import workers

TURNS = [{"from": "human", "value": "春眠"}, {"from": "gpt", "value": "不觉晓"}, {"from": "human", "value": "花落"}]
FAST = AdamW(learning_rate=1e-3)


def some_examples(count=10, vocabulary=96, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, vocabulary, rng.integers(4, 14)) for _ in range(count)]
    return [Example(row, np.where(np.arange(len(row)) < 2, -100, row)) for row in rows]


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


# --- data ---


def test_the_official_preprocessing(tmp_path):
    tokenizer = refimpl.load().tokenizer
    spring, dawn, flowers = (tokenizer.encode(turn["value"]) for turn in TURNS)
    data = [{"id": "1", "conversations": TURNS}]
    [example] = read_examples(written(tmp_path / "d.json", data), tokenizer, 512)
    assert example.ids.tolist() == [195, *spring, 196, *dawn, 195, *flowers, 2]
    assert example.labels.tolist() == [2, *[-100] * len(spring), -100, *dawn, 2, *[-100] * len(flowers), 2]
    [short] = read_examples(tmp_path / "d.json", tokenizer, 5)
    assert short.ids.tolist() == example.ids[:5].tolist() and short.labels.tolist() == example.labels[:5].tolist()


def test_json_lines_are_the_same_data(tmp_path):
    tokenizer = refimpl.load().tokenizer
    items = [{"conversations": TURNS}, {"conversations": TURNS[:2]}]
    one = read_examples(written(tmp_path / "a.json", items), tokenizer, 64)
    two = read_examples(written(tmp_path / "b.jsonl", "\n".join(map(json.dumps, items)) + "\n"), tokenizer, 64)
    assert [e.ids.tolist() for e in one] == [e.ids.tolist() for e in two] and len(one) == 2


@pytest.mark.parametrize("content, says", [
    ("", "holds no conversation"),
    ("[]", "holds no conversation"),
    ('[\n{"conversations": []}]', "line 2: expected an object with a list of conversations"),
    ('[\n {"conversations": [{"from": "human", "value": "a"}]},\n 7]', "line 3: expected an object"),
    ('[\n {"conversations":\n [{"from": "robot", "value": "a"}]}]', "line 2: a turn is .*robot"),
    ('{"conversations": [{"from": "gpt", "value": 3}]}', "line 1: a turn's value is 3, expected text"),
    ('[{"conversations": [\n\n{"from": human}]}]', "line 3: this is not JSON"),
    ('[{"conversations": [{"from": "human", "value": "a"}]}\n', "the list is not closed"),
    ('[{"conversations": [{"from": "human", "value": "\xff"}]}]'.encode("latin-1"), "not UTF-8"),
])  # fmt: skip
def test_malformed_data_names_the_line(content, says, tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says) as caught:
        read_examples(path, refimpl.load().tokenizer, 512)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_answers_beyond_the_maximum_length_are_refused(tmp_path):
    path = written(tmp_path / "d.json", [{"conversations": TURNS[:2]}])
    with pytest.raises(InputError, match="no answer within 3 tokens"):
        read_examples(path, refimpl.load().tokenizer, 3)


# --- a run ---


def test_every_epoch_has_its_own_order_from_the_seed():
    plan = order(10, Options(epochs=2, batch_size=3, accumulation=2))
    assert [[len(batch) for batch in step] for step in plan] == [[3, 3], [3, 1]] * 2
    epochs = [[i for step in plan[at : at + 2] for batch in step for i in batch] for at in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    assert plan == order(10, Options(epochs=2, batch_size=3, accumulation=2))
    assert plan != order(10, Options(epochs=2, batch_size=3, accumulation=2, seed=7))


def test_it_learns_and_what_is_written_is_what_was_learned(family, tmp_path, tiny_folder):
    model, examples = refimpl.load(tiny_folder(family)), some_examples()
    done = finetune(model, examples, tmp_path / "out", Options(FAST, epochs=8, batch_size=4))
    assert np.mean(done.losses[-3:]) < np.mean(done.losses[:3]) - 0.3
    saved = refimpl.load(tmp_path / "out")
    for name, x in done.parameters.items():
        assert np.array_equal(saved.weights[name].array, x), name
    assert json.loads((tmp_path / "out" / "losses.json").read_text())["losses"] == done.losses
    assert (tmp_path / "out" / "loss.svg").read_text().startswith("<svg")
    assert not (tmp_path / "out.part").exists()


def test_the_first_loss_is_that_of_the_batch(tmp_path, tiny_folder):
    """The mean over all labels of the batch, however it is cut into pieces."""
    model = refimpl.load(tiny_folder("Qwen2-7B"))
    row = np.arange(1, 13)
    examples = [Example(row + i, row + i) for i in range(3)]
    tuning = Tuning(model, examples, Options(batch_size=3))
    ids = np.stack([examples[i].ids for i in tuning.plan[0][0]])
    assert tuning.step() == pytest.approx(loss(model, ids, ids), rel=1e-6)


def test_pieces_of_a_batch_add_up(tmp_path, tiny_folder, monkeypatch):
    model, examples = refimpl.load(tiny_folder("Baichuan2-7B")), some_examples()
    options = Options(batch_size=10, steps=1, z_loss_weight=0.01)
    whole, cut = Tuning(model, examples, options), Tuning(model, examples, options)
    whole.step()
    monkeypatch.setattr(at, "PIECE_TOKENS", 20)
    cut.step()
    assert cut.losses == pytest.approx(whole.losses, rel=1e-6) and cut.norms == pytest.approx(whole.norms, rel=1e-5)


def test_accumulated_batches_are_averaged(tiny_folder):
    model, examples = refimpl.load(tiny_folder("Baichuan2-13B")), some_examples(4)
    two = Tuning(model, examples, Options(batch_size=2, accumulation=2))
    halves = [Tuning(model, [examples[i] for i in batch], Options(batch_size=2)) for batch in two.plan[0]]
    two.step()
    assert two.losses[0] == pytest.approx(np.mean([half.step() for half in halves]), rel=1e-6)


@pytest.mark.parametrize("lora", [None, Lora(rank=2, targets=("W_pack", "down_proj"))])
def test_a_killed_run_goes_on_to_the_same_bits(lora, tmp_path, tiny_folder):
    model, examples = refimpl.load(tiny_folder("Baichuan2-7B")), some_examples()
    options = Options(FAST, lora, epochs=2, batch_size=3)
    whole = finetune(model, examples, tmp_path / "whole", options)

    class KilledError(Exception):
        pass

    def die(step, loss):
        if step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(model, examples, tmp_path / "cut", options, save_seconds=0, on_step=die)
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.part" / "state.safetensors").exists()
    resumed = finetune(model, examples, tmp_path / "cut", options)
    assert resumed.losses == whole.losses and resumed.norms == whole.norms
    for file in sorted(path.name for path in (tmp_path / "whole").iterdir()):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_another_run_s_state_is_not_taken_up(tmp_path, tiny_folder):
    model, examples = refimpl.load(tiny_folder("Baichuan2-7B")), some_examples()
    tuning = Tuning(model, examples, Options(steps=2))
    (tmp_path / "out.part").mkdir()
    tuning.save_state(tmp_path / "out.part", "another")
    with pytest.raises(InputError, match="holds another run"):
        finetune(model, examples, tmp_path / "out", Options(steps=2))
    (tmp_path / "out.part" / "state.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"cannot read .* to begin anew"):
        finetune(model, examples, tmp_path / "out", Options(steps=2))


def test_workers_change_no_bit(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(at, "PIECE_TOKENS", 20)
    model, examples = refimpl.load(tiny_folder("Baichuan2-7B")), some_examples()
    options = Options(FAST, epochs=1, batch_size=5)
    alone = finetune(model, examples, tmp_path / "alone", options)
    with workers(2) as executor:
        shared = finetune(model, examples, tmp_path / "shared", options, executor)
    assert shared.losses == alone.losses
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "shared"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


# --- adapters ---


def test_an_adapter_is_merged_by_convert(tmp_path, tiny_folder):
    folder, examples = tiny_folder("Baichuan2-7B"), some_examples()
    lora = Lora(rank=2, alpha=8, targets=("W_pack", "gate_proj"))
    done = finetune(refimpl.load(folder), examples, tmp_path / "a", Options(FAST, lora, epochs=3, batch_size=4))
    assert np.mean(done.losses[-2:]) < np.mean(done.losses[:2])
    convert(folder, tmp_path / "merged", lora=tmp_path / "a")
    merged = refimpl.load(tmp_path / "merged")
    ids = [5, 17, 9, 3, 80]
    adapted = refimpl.Model(merged.config, done.weights)
    difference = np.abs(merged(ids, "float64") - adapted(ids, "float64")).max()
    assert difference < 1e-6 * np.abs(merged(ids)).max()
    assert np.abs(merged(ids) - refimpl.load(folder)(ids)).max() > 1e-3


def test_the_base_stays_in_four_bits(tmp_path, tiny_folder):
    """QLoRA: NF4 with double quantization, to which no gradient goes; training begins at the quantized model."""
    base = refimpl.load(tiny_folder("Baichuan2-7B")).quantize("nf4")
    tuning = Tuning(base, some_examples(), Options(FAST, Lora(rank=4), epochs=3, batch_size=5))
    before = base([5, 17, 9])
    assert np.array_equal(refimpl.Model(base.config, tuning.weights)([5, 17, 9]), before), "B is zero at first"
    for _ in tuning.plan:
        tuning.step()
    assert tuning.losses[-1] < tuning.losses[0]
    assert set(tuning.parameters) == {
        f"model.layers.{i}.self_attn.W_pack.lora_{part}.weight" for i in (0, 1) for part in "AB"
    }
    assert np.array_equal(base([5, 17, 9]), before)


def test_peft_loads_the_adapter(tmp_path, tiny_folder):
    pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder = tiny_folder("Qwen2-7B")
    lora = Lora(rank=2, alpha=8, targets=("q_proj", "down_proj"))
    done = finetune(refimpl.load(folder), some_examples(), tmp_path / "a", Options(FAST, lora, epochs=1, batch_size=4))
    import torch

    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), str(tmp_path / "a")
    )
    ids = [[5, 17, 9, 3, 80]]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    found = refimpl.Model(refimpl.load(folder).config, done.weights)(ids, "float64")
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


# --- what is refused ---


@pytest.mark.parametrize("change, says", [
    (dict(optimizer=dict(beta2=1.0)), "beta2 is 1.0"),
    (dict(optimizer=dict(learning_rate=-1)), "learning_rate is -1"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(steps=0), "steps is 0"),
    (dict(lora=dict(rank=0)), "the rank is 0"),
    (dict(lora=dict(targets=("nothing",))), "no linear is called 'nothing'; expected some of W_pack, down_proj"),
    (dict(lora=dict(targets=("lm_head",))), "NormHead"),
])  # fmt: skip
def test_options_that_do_not_fit(change, says, tmp_path, tiny_folder):
    def made():
        parts = {"optimizer": AdamW, "lora": Lora}
        return Options(**{k: parts[k](**v) if k in parts else v for k, v in change.items()})

    with pytest.raises(InputError, match=says):
        finetune(refimpl.load(tiny_folder("Baichuan2-7B")), some_examples(), tmp_path / "out", made())
    assert not list(tmp_path.iterdir())


def test_blocks_and_places_that_do_not_fit(tmp_path, tiny_folder, monkeypatch):
    model, examples = refimpl.load(tiny_folder("Baichuan2-7B")), some_examples()
    cases = [
        ((model.quantize("int4"), examples, tmp_path / "out"), "weights in 4-bit blocks cannot learn; train adapters"),
        ((model, [], tmp_path / "out"), "there is no example"),
        ((model, examples, tmp_path), "is there already"),
        ((model, [Example(np.ones(65, np.int64), np.ones(65, np.int64))], tmp_path / "out"), "more than the context"),
        ((model, [Example(np.ones(4, np.int64), np.full(4, -100))], tmp_path / "out"), "no label counts in the batch"),
        ((refimpl.Model(model.config, model.weights), examples, tmp_path / "out"), "comes from no folder"),
    ]
    for arguments, says in cases:
        with pytest.raises(InputError, match=says):
            finetune(*arguments)
    monkeypatch.setattr(at, "_physical_memory", lambda: 1e5)
    with pytest.raises(InputError, match="what learns needs"):
        finetune(model, examples, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, tiny_folder):
    model = refimpl.load(tiny_folder("Baichuan2-7B"))
    broken = model.weights["model.layers.0.mlp.gate_proj.weight"].array.copy()
    broken[0, 0] = np.inf
    weights = model.weights.replace({"model.layers.0.mlp.gate_proj.weight": Weight(broken)})
    bad = refimpl.Model(model.config, weights, model.folder)
    with pytest.raises(InputError, match=r"the loss is nan: model\.layers\.0\.mlp\.gate_proj is the first"):
        finetune(bad, some_examples(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_clear_line(tmp_path, tiny_folder, monkeypatch):
    """The state of before is whole, and the run goes on from there."""
    model, examples = refimpl.load(tiny_folder("Baichuan2-7B")), some_examples()
    options, full = Options(FAST, steps=4), []
    right = Path.replace

    def replace(source, target):
        if str(target).endswith("state.safetensors"):
            full.append(target)
            if len(full) == 3:
                raise OSError(28, "No space left on device")
        return right(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        finetune(model, examples, tmp_path / "out", options, save_seconds=0)
    assert sorted(path.name for path in (tmp_path / "out.part").iterdir()) == ["state.safetensors"]
    done = finetune(model, examples, tmp_path / "out", options)
    monkeypatch.undo()
    assert done.losses == finetune(model, examples, tmp_path / "again", options).losses


# --- the verb ---


def test_the_verb_and_a_kill(tmp_path, capsys):
    """SIGKILL while it trains; the same command goes on, to what an uninterrupted one gives."""
    data = [{"conversations": [*TURNS[:1], {"from": "gpt", "value": f"不觉晓，处处闻啼鸟。{i}"}]} for i in range(8)]
    written(tmp_path / "d.json", data)
    arguments = ["finetune", "--data", str(tmp_path / "d.json"), "--batch-size", "4", "--learning-rate", "1e-3"]
    arguments += ["--lora", "--rank", "2", "--epochs", "10"]
    assert main([*arguments, "--out", str(tmp_path / "whole"), "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert len(losses) == 20 and losses[-1] < losses[0]
    code = """if True:
        import sys, refimpl.gradients.finetune as at
        at.finetune.__defaults__ = (None, None, 0.0, lambda *_: None)  # a state after each step
        from refimpl.cli import main
        sys.exit(main(sys.argv[1:]))
    """
    child = subprocess.Popen([sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "cut")])
    state = tmp_path / "cut.part" / "state.safetensors"
    while not state.exists() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "cut").exists()
    assert main([*arguments, "--out", str(tmp_path / "cut")]) == 0
    assert "the adapter" in capsys.readouterr().out
    for file in ("adapter_model.safetensors", "adapter_config.json", "losses.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_verb_refuses_in_one_line(tmp_path, capsys):
    empty = written(tmp_path / "empty.json", "")
    cases = [
        (["--data", str(empty)], "holds no conversation"),
        (["--data", str(tmp_path / "no.json")], "cannot read"),
        (["--data", str(empty), "--qlora"], "give --lora"),
        (["--data", str(empty), "--max-length", "1"], "at least 2"),
    ]
    for arguments, says in cases:
        assert main(["finetune", "--out", str(tmp_path / "out"), *arguments]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_a_checkpoint_keeps_its_number_format(tmp_path):
    import ml_dtypes

    folder = write_checkpoint(tmp_path / "m", "Baichuan2-7B", dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16")
    finetune(refimpl.load(folder), some_examples(), tmp_path / "out", Options(FAST, steps=1))
    saved = refimpl.load(tmp_path / "out").weights["model.norm.weight"].array
    assert saved.dtype == ml_dtypes.bfloat16 and Path(tmp_path / "out" / "config.json").exists()
