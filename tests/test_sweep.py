"""Pieces of work: in order, elsewhere, resumed, and the same to the bit whoever computes them."""

import json
import os
import pickle
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np
import pytest
from conftest import write_checkpoint

import refimpl
from golden.cost.predict import predict, what_if
from golden.cost.quality import quality
from golden.cost.reading import Reading
from refimpl import InputError
from refimpl.blocks.importance import observe_importance
from refimpl.cli import main
from refimpl.decoder import Decoder
from refimpl.grids.calibrate import calibrate
from refimpl.model import EMBEDDED, remade
from refimpl.sweep import elsewhere, here, sweep, workers

TEXT = [int(i) for i in np.random.default_rng(0).integers(3, 90, 300)]
calls: list[int] = []


def square(x: int) -> dict[str, np.ndarray]:
    calls.append(x)
    if x == 13:
        raise InputError("13 is unlucky")
    return {"x": np.array([x * x], np.float64)}


class Backwards:
    """An executor that begins with what came last, and says what was cancelled."""

    def __init__(self):
        self.made: list = []

    def submit(self, function, /, *arguments):
        executor = self

        class Late(Future):
            def result(self, timeout=None):
                for future, work in reversed(executor.made):
                    if not future.done():
                        future.set_result(work())
                return super().result(timeout)

        future = Late()
        self.made.append((future, lambda: function(*arguments)))
        return future


def values(*arguments, **options) -> list[float]:
    calls.clear()
    return [float(result["x"][0]) for result in sweep(square, *arguments, "squaring", **options)]


def test_results_come_in_the_order_of_the_pieces():
    pieces = [(x,) for x in (3, 1, 2)]
    assert values(pieces) == [9, 1, 4] and calls == [3, 1, 2]
    assert values(pieces, executor=Backwards()) == [9, 1, 4] and calls == [2, 1, 3]


def test_what_is_finished_is_not_computed_again(tmp_path):
    first = [(x,) for x in (1, 2, 13, 4)]
    with pytest.raises(InputError, match="unlucky"):
        values(first, resume=tmp_path)
    assert calls == [1, 2, 13]
    assert values([(x,) for x in (1, 2, 3, 4)], resume=tmp_path) == [1, 4, 9, 16] and calls == [3, 4]
    for file in tmp_path.iterdir():  # cut short: as if it were not there
        file.write_bytes(file.read_bytes()[:-1])
        break
    assert values([(x,) for x in (1, 2, 3, 4)], resume=tmp_path) == [1, 4, 9, 16] and len(calls) == 1
    with pytest.raises(InputError, match="cannot keep results"):
        values(first, resume=tmp_path / file.name)


def test_a_changed_checkpoint_is_not_resumed(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "Qwen2-7B")
    small = refimpl.load(folder).quantize("q4_0")
    before = quality(small, refimpl.load(folder), TEXT[:50], Reading(resume=tmp_path / "kept"))
    write_checkpoint(folder, "Qwen2-7B", seed=1)
    after = quality(
        refimpl.load(folder).quantize("q4_0"), refimpl.load(folder), TEXT[:50], Reading(resume=tmp_path / "kept")
    )
    assert before != after


def test_another_backend_is_not_resumed(tiny_folder, tmp_path):
    """Its last bits are others."""
    model = refimpl.load(tiny_folder("Qwen2-7B"))
    small = model.quantize("q4_0")
    for backend in ("numpy", "numba"):
        alone = quality(small.with_backend(backend), model, TEXT[:50])
        assert quality(small.with_backend(backend), model, TEXT[:50], Reading(resume=tmp_path)) == alone
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_travels_as_the_calls_that_made_it(tiny_folder):
    model = refimpl.load(tiny_folder("Baichuan2-7B"))
    small = model.quantize("int4", 16, keep=["lm_head"])
    sent = pickle.dumps(small)
    assert len(sent) < 1000
    back = pickle.loads(sent)
    assert np.array_equal(back(TEXT[:9]), small(TEXT[:9])) and back.made == small.made
    assert pickle.loads(pickle.dumps(small)) is back, "a process makes it once"
    assert remade(small.made, "numba").backend == "numba"
    with pytest.raises(InputError, match="put together in memory"):
        pickle.dumps(refimpl.Model(model.config, model.weights))


class LoudGate(Decoder):
    """A decoder that other processes can import."""

    def mlp(self, at, x):
        return 2 * super().mlp(at, x)


def test_a_decoder_travels_by_its_name(tiny_folder, tmp_path, monkeypatch):
    model = refimpl.load(tiny_folder("Baichuan2-7B"))
    loud = model.with_decoder(LoudGate).quantize("q4_0")
    alone = quality(loud, model, TEXT[:50])
    assert alone != quality(model.quantize("q4_0"), model, TEXT[:50])
    with workers(2) as executor:
        assert quality(loud, model, TEXT[:50], Reading(executor=executor)) == alone

    class Local(Decoder):
        pass

    with pytest.raises(InputError, match=r"Local cannot be sent to other processes.*define it at the top of a module"):
        pickle.dumps(model.with_decoder(Local))
    lost = pickle.dumps((square, (model.with_decoder(LoudGate),)))
    monkeypatch.delattr("test_sweep.LoudGate")
    error, _ = elsewhere(here(), lost)
    assert isinstance(error, InputError) and "cannot import what it was sent" in str(error)


def test_a_class_under_an_old_name_is_another(tiny_folder, monkeypatch):
    """As in a notebook, whose cell is run again."""
    model = refimpl.load(tiny_folder("Qwen2-7B"))
    before = pickle.loads(pickle.dumps(model.with_decoder(LoudGate)))
    again = type("LoudGate", (Decoder,), {"__module__": __name__})
    monkeypatch.setattr("test_sweep.LoudGate", again)
    after = pickle.loads(pickle.dumps(model.with_decoder(again)))
    assert (before.decoder_class.mlp, after.decoder_class.mlp) != (before.decoder_class.mlp,) * 2


def test_a_changed_decoder_is_not_resumed(tiny_folder, tmp_path, monkeypatch):
    model = refimpl.load(tiny_folder("Qwen2-7B"))
    loud = model.with_decoder(LoudGate)
    before = quality(loud, model, TEXT[:50], Reading(resume=tmp_path))
    assert quality(loud, model, TEXT[:50], Reading(resume=tmp_path)) == before and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("inspect.getsource", lambda object: "another")
    quality(loud, model, TEXT[:50], Reading(resume=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    with pytest.raises(InputError, match="the source of Typed is in no file"):
        quality(model.with_decoder(type("Typed", (Decoder,), {})), model, TEXT[:50], Reading(resume=tmp_path))


def test_processes_give_the_same_bits(tiny_folder):
    model = refimpl.load(tiny_folder("Baichuan2-13B"))
    small = model.quantize("q4_0")
    alone = quality(small, model, TEXT)
    with workers(2) as executor:
        assert quality(small, model, TEXT, Reading(executor=executor)) == alone
        with pytest.raises(InputError, match="put together in memory"):
            quality(refimpl.Model(model.config, model.weights), model, TEXT, Reading(executor=executor))
    large, ids = refimpl.load(), [int(i) for i in np.random.default_rng(0).integers(3, 3000, 600)]
    alone = quality(large.quantize("q4_0"), large, ids)  # large enough for a BLAS to take several threads
    with workers(2) as executor:
        assert quality(large.quantize("q4_0"), large, ids, Reading(executor=executor)) == alone
    with workers(2) as executor, pytest.raises(InputError, match="a worker died"):
        list(sweep(os._exit, [(3,)], "dying", executor))


def test_a_dask_cluster_gives_the_same_bits(tiny_folder, monkeypatch):
    distributed = pytest.importorskip("distributed")
    model = refimpl.load(tiny_folder("Qwen2-7B"))
    small = model.quantize("q4_0")
    alone = quality(small, model, TEXT)
    options = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with distributed.LocalCluster(**options) as cluster, workers(dask=cluster.scheduler_address) as executor:
        assert quality(small, model, TEXT, Reading(executor=executor)) == alone
        with pytest.raises(InputError, match="vocabulary"):
            list(sweep(remake_and_run, [(small, [99])], "failing", executor))
        cluster.scheduler.allowed_failures = 0
        with pytest.raises(InputError, match=r"a worker died.*\(KilledWorker"):
            list(sweep(os._exit, [(3,)], "dying", executor))
    monkeypatch.setattr("refimpl.sweep.PATIENCE", 1)
    for address in ("tcp://127.0.0.1:9", "nothing", "tls://127.0.0.1:9", "[::1", ""):
        start = time.monotonic()
        with pytest.raises(InputError, match="no Dask scheduler answers at"), workers(dask=address):
            pass
        assert time.monotonic() - start < 10, "it waits for what it has not begun"


@pytest.mark.parametrize("when", ["submit", "result"])
def test_an_executor_that_is_gone_is_told_in_a_line(when):
    class Gone(Future):
        def submit(self, function, /, *arguments):
            if when == "submit":
                raise RuntimeError("cannot schedule new futures after shutdown")
            return self

        def result(self, timeout=None):
            raise CancelledError

        def cancel(self):
            raise OSError("nobody there")

    with pytest.raises(InputError, match=r"a worker died.*(Cancelled|schedule)"):
        values([(1,), (2,)], executor=Gone())


def divide(x: int) -> dict[str, np.ndarray]:
    return {"x": np.array([1 // x])}


def test_a_fault_of_a_piece_is_no_fault_of_its_worker():
    with pytest.raises(ZeroDivisionError) as raised:
        list(sweep(divide, [(1,), (0,)], "dividing", Backwards()))
    assert "in divide" in str(raised.value.__cause__), "where it was"


def remake_and_run(model, ids):
    return {"x": model(ids)}


def test_calibration_gives_the_same_bits(tiny_folder, tmp_path):
    model = refimpl.load(tiny_folder("Qwen2-7B"))
    alone = calibrate(model, TEXT, method="mse", window=50)
    with ThreadPoolExecutor(2) as executor:
        shared = calibrate(model, TEXT, method="mse", window=50, executor=executor, resume=tmp_path)
    resumed = calibrate(model, TEXT, method="mse", window=50, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    assert pickle.dumps(alone) == pickle.dumps(shared) == pickle.dumps(resumed)


def test_a_prediction_gives_the_same_bits(tiny_folder):
    model = refimpl.load(tiny_folder("Qwen2-7B"))
    encodings = calibrate(model, TEXT)
    changes = [("*.mlp.*.weight", 8)]
    alone = predict(model, encodings, TEXT, Reading(50)), what_if(model, encodings, TEXT, changes, Reading(50))
    with workers(2) as executor:
        shared = predict(model, encodings, TEXT, Reading(50, executor=executor))
        assert (shared, what_if(model, encodings, TEXT, changes, Reading(50, executor=executor))) == alone


def test_importance_gives_the_same_bits(tiny_folder):
    model = refimpl.load(tiny_folder("Baichuan2-7B"))
    alone = observe_importance(model, TEXT, 50)
    with ThreadPoolExecutor(2) as executor:
        assert observe_importance(model, TEXT, 50, executor=executor).sha256 == alone.sha256


def test_calibrate_says_in_json_what_it_did(tmp_path, capsys):
    out = str(tmp_path / "e.json")
    text = ["--text", str(EMBEDDED / "held_out.txt"), "--tokens", "200", "--window", "50"]
    assert main(["calibrate", *text, "--out", out, "--json", "--jobs", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["out"] == out and said["tokens"] == 200 and said["activations"] > 40
    assert main(["calibrate", *text, "--out", str(tmp_path / "f.json")]) == 0
    assert (tmp_path / "e.json").read_bytes() == (tmp_path / "f.json").read_bytes()
