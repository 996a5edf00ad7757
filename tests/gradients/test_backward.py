"""Gradients against differences of the loss, with and without recomputation, and what is refused."""

import json

import numpy as np
import pytest
from conftest import write_checkpoint

import refimpl
from refimpl import InputError
from refimpl.checkpoint.weights import NormHead, Weight
from refimpl.config import FAMILIES
from refimpl.gradients.backward import backward, gradients
from refimpl.gradients.objective import Teacher
from refimpl.gradients.tape import Tape
from refimpl.loss import loss
from refimpl.names import taps
from refimpl_kernels.ops import NumPyOps

IDS = np.array([[5, 17, 9, 3, 80, 44, 2, 61, 9, 9, 33, 20], [4, 8, 3, 9, 2, 7, 1, 12, 3, 3, 5, 6]])
LABELS = np.where(np.arange(12) < 4, -100, IDS)


def changed(model, name, array):
    """The model with other values of a parameter."""
    weights = {name: type(model.weights[name])(array)}
    if model.config.tie_word_embeddings and name == "model.embed_tokens.weight":
        weights["lm_head.weight"] = type(model.weights["lm_head.weight"])(array)
    return refimpl.Model(model.config, model.weights.replace(weights))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_changes_the_loss_as_its_gradient_says(family, tied, tmp_path):
    """The second opinion: (L(w + hv) - L(w - hv)) / 2h along a random v is off by h² and by 1e-16 / h."""
    model = refimpl.load(write_checkpoint(tmp_path / "m", family, tie_word_embeddings=tied))
    found, grads = gradients(model, IDS, LABELS, "*.weight", "float64", z_loss_weight=0.01)
    assert found == pytest.approx(loss(model, IDS, LABELS, "float64", z_loss_weight=0.01), rel=1e-14)
    rng, h = np.random.default_rng(0), 1e-4
    for name, g in grads.items():
        stored = model.weights[name].array.astype(np.float64)
        v = rng.standard_normal(stored.shape)
        v /= np.linalg.norm(v)
        up, down = (
            loss(changed(model, name, stored + step * v), IDS, LABELS, "float64", z_loss_weight=0.01)
            for step in (h, -h)
        )
        expected = float((g * v).sum())
        assert (up - down) / (2 * h) == pytest.approx(expected, rel=1e-6, abs=1e-10), name


def test_every_tap_and_parameter_has_a_gradient_of_its_shape(family, tiny_model):
    model = tiny_model(family)
    trace = model.trace(IDS)
    _, grads = gradients(model, IDS, LABELS)
    parameters = [name for name in model.weights]
    assert set(grads) == set(taps(model.config)) | set(parameters)
    assert [name for name in grads if name in trace] == list(reversed(trace)), "last to first"
    for name, g in grads.items():
        assert g.shape == (trace[name].shape if name in trace else model.weights[name].shape), name
        assert g.dtype == np.float32, name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_recomputed_layers_have_the_same_bits(dtype, family, tiny_model):
    one = gradients(tiny_model(family), IDS, LABELS, dtype=dtype)
    two = gradients(tiny_model(family), IDS, LABELS, dtype=dtype, recompute=True)
    assert one[0] == two[0] and list(one[1]) == list(two[1])
    assert all(np.array_equal(one[1][name], two[1][name]) for name in one[1])


def test_numba_s_forward_has_the_same_gradients(family, tiny_model):
    _, exact = gradients(tiny_model(family), IDS, LABELS, dtype="float64")
    _, found = gradients(tiny_model(family).with_backend("numba"), IDS, LABELS)
    for name in exact:
        assert np.abs(found[name] - exact[name]).max() < 2e-5 * np.abs(exact[name]).max(), name


def test_what_is_wanted_alone(tiny_model):
    model = tiny_model("Baichuan2-7B")
    _, every = gradients(model, IDS, LABELS)
    _, some = gradients(model, IDS, LABELS, wrt="*.W_pack.weight")
    assert list(some) == [f"model.layers.{i}.self_attn.W_pack.weight" for i in (1, 0)]
    assert all(np.array_equal(some[name], every[name]) for name in some)


def test_padding_is_seen_by_nobody(family, tiny_model):
    """What stands in the padding changes no gradient of a real token."""
    model, mask = tiny_model(family), np.array([[0] * 4 + [1] * 8, [1] * 12])
    labels = np.where(mask, IDS, -100)
    labels[0, 4] = -100  # it would be predicted from the padding before it
    other = np.where(mask, IDS, 7)
    one, two = (gradients(model, ids, labels, "*.weight", "float64", mask)[1] for ids in (IDS, other))
    for name in one:
        assert np.abs(one[name] - two[name]).max() <= 1e-12 * np.abs(two[name]).max(), name


def test_a_batch_is_its_rows(tiny_model):
    """Where each row has as many labels, the batch's gradient is the mean of the rows' own."""
    model = tiny_model("Qwen2-7B")
    _, both = gradients(model, IDS, LABELS, "*.weight", "float64")
    rows = [gradients(model, IDS[i : i + 1], LABELS[i : i + 1], "*.weight", "float64")[1] for i in (0, 1)]
    for name in both:
        mean = (rows[0][name] + rows[1][name]) / 2
        assert np.abs(both[name] - mean).max() <= 1e-13 * np.abs(mean).max(), name


def test_norm_head_s_gradient_leaves_the_length_alone(tiny_model):
    """A row's gradient is at right angles to the row; a row of zeros is divided by a constant."""
    model = tiny_model("Baichuan2-7B")
    head = model.weights["lm_head.weight"].array.astype(np.float64)
    assert isinstance(model.weights["lm_head.weight"], NormHead)
    _, grads = gradients(model, IDS, LABELS, "lm_head.weight", "float64")
    along = (grads["lm_head.weight"] * head).sum(-1)
    assert np.abs(along).max() < 1e-15
    head[3] = 0
    _, grads = gradients(changed(model, "lm_head.weight", head), IDS, LABELS, "lm_head.weight", "float64")
    assert np.isfinite(grads["lm_head.weight"]).all()


def test_fed_gradients_show_each_tensor_s_own_error(tiny_model):
    model = tiny_model("Baichuan2-7B")
    _, right = gradients(model, IDS, LABELS, dtype="float64")
    at = "model.layers.1.mlp.product"
    feed = {**right, at: right[at] * 2}
    _, found = gradients(model, IDS, LABELS, dtype="float64", feed=feed)
    wrong = [n for n in found if np.abs(found[n] - right[n]).max() > 1e-9 * np.abs(right[n]).max()]
    assert wrong == ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.act_fn"], "what it goes to, and no more"


def test_a_teacher_that_agrees_has_nothing_to_say(tiny_model):
    model = tiny_model("Baichuan2-7B")
    value, grads = backward(model, IDS, Teacher(model(IDS, "float64")), "*.weight", "float64")
    assert abs(value) < 1e-15 and max(np.abs(g).max() for g in grads.values()) < 1e-13
    other = changed(model, "model.norm.weight", model.weights["model.norm.weight"].array * np.float32(1.1))
    value, grads = backward(other, IDS, Teacher(model(IDS, "float64")), "*.weight", "float64")
    assert value > 0 and np.abs(grads["model.norm.weight"]).max() > 1e-6


def test_a_tensor_used_twice_gets_both_gradients():
    tape = Tape(NumPyOps("float64"))
    x = tape.tensor(np.array([[3.0, -1.0]]))
    y = (x - 2.0) * x + tape.concat((x[:, 1:], x[:, :1]))
    tape.backward(y, np.array([[1.0, 10.0]]))
    assert x.gradient.tolist() == [[2 * 3 - 2 + 10.0, 10 * (2 * -1 - 2) + 1.0]]


@pytest.mark.parametrize("arguments, says", [
    (dict(labels=[1, 2, 3]), r"the labels are int64 \(3,\), expected one for each id, \(2, 12\)"),
    (dict(labels=LABELS.astype(float)), "the labels are float64"),
    (dict(labels=np.full_like(IDS, -100)), "no label counts"),
    (dict(labels=np.where(LABELS == 9, 96, LABELS)), "one is 96"),
    (dict(labels=np.where(LABELS == 9, -3, LABELS)), "one is -3"),
    (dict(ids=[1, 96], labels=[1, 2]), "token id 96 is outside the vocabulary of 96"),
    (dict(dtype="bfloat16"), "dtype is 'bfloat16', expected one of float32, float64"),
    (dict(wrt="nothing"), "no tensor is called 'nothing'; names are such as model.embed_tokens"),
    (dict(attention_mask=np.ones((1, 3))), "attention_mask"),
    (dict(ids=[1] * 65, labels=[1] * 65), "65 tokens exceed the context of 64"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, says, tiny_model):
    with pytest.raises(InputError, match=says) as caught:
        gradients(tiny_model("Baichuan2-7B"), **{"ids": IDS, "labels": LABELS, **arguments})
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_names_the_first_tensor(tiny_model):
    model = tiny_model("Baichuan2-7B")
    broken = model.weights["model.layers.1.mlp.up_proj.weight"].array.copy()
    broken[3, 5] = np.nan
    weights = model.weights.replace({"model.layers.1.mlp.up_proj.weight": Weight(broken)})
    with pytest.raises(InputError, match=r"the loss is nan: model\.layers\.1\.mlp\.up_proj is the first tensor with"):
        gradients(refimpl.Model(model.config, weights), IDS, LABELS)


def test_the_number_of_threads_changes_no_bit(tmp_path):
    """In processes of their own, since a pool of threads is made once."""
    import os
    import subprocess
    import sys

    program = """if True:
        import hashlib, numpy as np, refimpl
        from refimpl.gradients.backward import gradients
        from refimpl.gradients import products
        products.WORTH = 0
        model = refimpl.load()
        ids = model.token_ids("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。" * 12)[:, :300]
        loss, grads = gradients(model, ids, ids)
        print(products.cores(), loss, hashlib.sha256(b"".join(g.tobytes() for g in grads.values())).hexdigest())
    """
    said = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                       env={**os.environ, "NUMBA_NUM_THREADS": threads}).stdout.split()
        for threads in ("1", "2")
    ]  # fmt: skip
    assert said[0][1:] == said[1][1:], json.dumps(said)


def test_recomputing_needs_the_memory_of_one_layer(tmp_path):
    import tracemalloc

    model = refimpl.load(write_checkpoint(tmp_path / "m", "Baichuan2-7B", num_hidden_layers=8))
    ids = np.random.default_rng(0).integers(1, 96, (4, 64))

    def peak(recompute):
        gradients(model, ids, ids, "lm_head", recompute=recompute)  # what is kept of weights is there
        tracemalloc.start()
        gradients(model, ids, ids, "lm_head", recompute=recompute)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(True) < 0.3 * peak(False)
