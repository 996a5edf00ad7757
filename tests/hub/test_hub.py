"""AI Hub in the loop: the unmodified client against a loopback server, and whatever may happen on the way."""

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import threading
import time
import zipfile

import h5py
import numpy as np
import onnx
import pytest
from loopback_hub import Fault, LoopbackHub, fake_quantize, grid_of

from export import emit
from export.folder.arrays import read_arrays
from export.folder.manifest import read_manifest
from export.graphs.plan import unpadded
from export.hub import connection, session
from export.hub.client import likely
from export.hub.loop import Loop, status
from export.hub.outputs import named_outputs
from export.hub.session import Session
from export.measure.device import read_device
from export.phone.options import Options
from export.phone.source import Source
from export.run.engines import Engine
from export.run.ledger import FILE, Ledger
from refimpl import load
from refimpl.cli import main
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate

PHONE = "Loopback Phone"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No waiting: neither ours nor the client's, which tries again for half a minute; and no client.ini but our own."""
    import backoff._sync
    import qai_hub.util.session

    monkeypatch.setattr(session, "POLL", 0.0)
    monkeypatch.setattr(connection, "PATIENCE", 0.0)
    monkeypatch.setattr(qai_hub.util.session, "BACKOFF_FACTOR", 0.0)
    monkeypatch.setattr(backoff._sync.time, "sleep", lambda _: None)
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "client.ini"))


@pytest.fixture(scope="session")
def exports(tiny_folder, tmp_path_factory):
    """name -> the folder of a small export, made once: "float", "one", a single graph, and "w4a16", quantized."""
    model, made = load(tiny_folder("Baichuan2-7B")), {}
    encodings = calibrate(model, np.arange(48) % 90)
    for name, tokens, parts, profile in (
        ("float", (4, 1), 3, "plain"), ("one", (4,), 1, "plain"), ("two", (4,), 2, "plain"),
        ("w4a16", (4, 1), 2, "aihub"),
    ):  # fmt: skip
        saved = emit(model, tokens=tokens, context=12, parts=parts, profile=profile,
                     encodings=encodings if profile == "aihub" else None)  # fmt: skip
        made[name] = saved.save(tmp_path_factory.mktemp("exports") / name)
    return made


@pytest.fixture
def export(exports, tmp_path):
    """The float export, to be worked on."""
    return shutil.copytree(exports["float"], tmp_path / "x")


def act(hub, verb, folder, *more, device=PHONE):
    place = [] if verb == "status" else ["--device", device, "--api-url", hub.url]
    return main(["hub", verb, str(folder), *place, *more])


def posts(hub):
    return {route: n for route, n in hub.counts.items() if route.startswith(("POST", "PUT", "PATCH"))}


def test_the_loop(export, capsys):
    with LoopbackHub() as hub:
        for verb, jobs in (("compile", {"compile": 6}), ("link", {"compile": 6, "link": 3})):
            assert act(hub, verb, export) == 0
            assert hub.kinds() == jobs
        assert act(hub, "infer", export) == 0
        # A graph that takes nothing from others is the same isolated and chained, and is run once.
        assert 6 <= hub.kinds()["inference"] <= 10
        assert act(hub, "profile", export) == 0
        assert act(hub, "fetch", export, "--binaries") == 0
        binary = export / "outputs" / "loopback-phone" / "binaries" / "part_2_of_3.bin"
        assert binary.read_bytes() == b"context prompt_ar4_cl12_2_of_3 token_ar1_cl12_2_of_3"
        sent = posts(hub)
        for verb in ("infer", "profile", "fetch"):
            assert act(hub, verb, export) == 0
        assert posts(hub) == sent, "a second time sends nothing"
        loop = Loop(Session(export, PHONE, hub.url))
        for spec in loop.specs:
            golden = read_arrays(export, spec, "output", spec.outputs)
            axes = {value.name: value.token_axis for value in spec.outputs}
            for way in ("isolated", "chained"):
                path = export / "outputs" / "loopback-phone" / way / f"{spec.name}.h5"
                [got] = named_outputs(path, loop.sources[spec.name], 1)
                for name, array in golden.items():
                    real = np.moveaxis(array - got[name], axes[name], 0)
                    assert np.abs(real[-spec.real :]).max() < 1e-4
            profile = json.loads((path.parents[1] / "profile" / f"{spec.name}.json").read_text())
            assert profile["execution_summary"]["estimated_inference_time"] == 1234
    capsys.readouterr()
    assert main(["hub", "status", str(export), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["state"] for row in rows} == {"done", "uploaded"}
    [row] = [row for row in rows if row["kind"] == "link" and row["label"] == "part_2_of_3"]
    assert row["options"] == "--qairt_version 2.42" and row["device"] == PHONE


def test_two_graphs_of_a_part_are_linked(export):
    with LoopbackHub() as hub:
        act(hub, "link", export)
        binaries = [m for m in hub.models.values() if len(m.graphs) > 1]
        assert [sorted(m.graphs) for m in binaries] == [
            [f"prompt_ar4_cl12_{i}_of_3", f"token_ar1_cl12_{i}_of_3"] for i in (1, 2, 3)
        ]


def test_the_output_file_is_the_client_s_own(exports, tmp_path):
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub() as hub:
        assert act(hub, "infer", folder) == 0
    with h5py.File(folder / "outputs" / "loopback-phone" / "chained" / "prompt_ar4_cl12_1_of_1.h5") as file:
        assert [(file[f"data/{i}"].attrs["order"], file[f"data/{i}"].attrs["name"]) for i in range(3)] == [
            (0, "logits"), (1, "past_key_0_out"), (2, "past_value_0_out")
        ]  # fmt: skip
        assert file["data/0/batch_0"].shape == (1, 4, 96)


@pytest.fixture(scope="module")
def quantized(exports):
    """The quantized export after its time on the device, and the jobs that were done there."""
    with pytest.MonkeyPatch.context() as patch, LoopbackHub(polls=0) as hub:
        patch.setenv("QAIHUB_CLIENT_INI", str(exports["w4a16"].parent / "none.ini"))
        assert act(hub, "infer", exports["w4a16"], "--qairt", "2.45", "--compile-options=--truncate_64bit_io") == 0
        return exports["w4a16"], {stored.kind: stored.proto for stored in reversed(hub.jobs.values())}


def test_w4a16_has_the_options_of_ai_hub_s_own_export(quantized):
    folder, jobs = quantized
    assert jobs["compile"].compile_job.options == (
        "--target_runtime qnn_dlc --qairt_version 2.45 --output_names _model_embed_tokens_Gather_Gather_output_0 "
        "--quantize_io --qnn_options context_enable_graphs=prompt_ar4_cl12_1_of_2 --quantize_full_type w8a16 "
        "--quantize_io --truncate_64bit_io"
    )
    assert jobs["link"].link_job.options == "--qairt_version 2.45"
    assert jobs["inference"].inference_job.options == (
        "--qairt_version 2.45 --qnn_options context_enable_graphs=prompt_ar4_cl12_1_of_2"
    )
    entries = Ledger(folder).entries.values()
    [link] = [e for e in entries if e["kind"] == "link" and e["label"] == "part_2_of_2"]
    spec = {name: (dtype, scale, zero) for name, dtype, _, scale, zero in link["outputs"]["token_ar1_cl12_2_of_2"]}
    assert spec["past_key_0_out"][0] == "uint8" and spec["past_key_0_out"][2] == 128 and spec["logits"][0] == "uint16"


def test_the_loopback_quantizes_as_a_device_does(quantized):
    """Its outputs are codes times scales, and those of the simulation but for a step here and there."""
    folder, _ = quantized
    plan, _ = read_manifest(folder, weights=False)
    for spec in (spec for run in plan.runs for spec in run if spec.part.layers):
        entries = json.loads((folder / spec.name / "model.encodings").read_text())["activation_encodings"]
        scales = {e["name"]: e["scale"][0] for e in entries}
        for way, golden in (("isolated", "simulated"), ("chained", "simulated_chained")):
            expected = read_arrays(folder, spec, golden, spec.outputs)
            path = folder / "outputs" / "loopback-phone" / way / f"{spec.name}.h5"
            [got] = named_outputs(path, Source.read(folder / spec.name), 1)
            for value in spec.outputs:
                codes, sure = (unpadded(value, a[value.name], spec) / scales[value.name] for a in (got, expected))
                assert np.abs(codes - np.rint(codes)).max() < 1e-2
                # One flip of the residual stream's last code moves every logit a little: 21 of 65536 were seen.
                assert np.abs(codes - sure).max() < (1.5 if value.name.startswith("past") else 65.5)


def test_the_verdict_on_the_loopback_s_phone(quantized, capsys):
    folder, _ = quantized
    assert main(["verify", str(folder), str(folder / "outputs" / "loopback-phone")]) == 0
    assert capsys.readouterr().out.startswith("agrees: ")


def test_the_verdict_on_a_phone_that_computes_in_float16(exports, tmp_path, capsys):
    """What has no encodings runs in a device's own floats. That is no fault, and a fault among them is found."""
    folder = shutil.copytree(exports["float"], tmp_path / "x")
    with LoopbackHub(half=True, engine="reference") as hub:
        assert act(hub, "infer", folder) == 0
        outputs = folder / "outputs" / "loopback-phone"
        capsys.readouterr()
        assert main(["verify", str(folder), str(outputs)]) == 0
        assert "judged as one that computes in float16" in capsys.readouterr().out
        assert main(["verify", str(folder), str(outputs), "--dtype", "float32"]) == 1
        assert "judged as one" not in capsys.readouterr().out
        device = ["--executor", "hub", "--device", PHONE, "--api-url", hub.url]
        for _ in range(2):  # what was kept of the runs says it, too
            assert main(["bisect", str(folder), *device]) == 0
            assert "judged as one that computes in float16" in capsys.readouterr().out
        assert main(["bisect", str(folder), *device, "--dtype", "float32"]) == 1
    for file in sorted(outputs.glob("*/prompt_*_2_of_3.h5")):
        with h5py.File(file, "r+") as h5:
            [place] = [one for one in h5["data"].values() if one.attrs["name"] == "past_key_0_out"]
            place["batch_0"][...] = -place["batch_0"][...]
    capsys.readouterr()
    assert main(["verify", str(folder), str(outputs)]) == 1
    told = capsys.readouterr().out
    assert "judged as one that computes in float16" in told and "self_attn.key" in told.split("\n")[0]


def test_a_phone_that_keeps_some_of_float32_is_told_of_float16(exports, tmp_path, capsys):
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub(half=True, engine="reference", spoil=lambda graph, outputs: {
        name: x * np.float32(1 + 2**-14) for name, x in outputs.items()
    }) as hub:  # fmt: skip
        assert act(hub, "infer", folder) == 0
    capsys.readouterr()
    outputs = str(folder / "outputs" / "loopback-phone")
    assert main(["verify", str(folder), outputs]) == 1
    assert "within float16's rounding; if the device computes in float16, give" in capsys.readouterr().out
    assert main(["verify", str(folder), outputs, "--dtype", "float16"]) == 0


def test_the_grids_of_the_loopback():
    entry = {"dtype": "INT", "bw": 4, "enc_type": "PER_CHANNEL", "scale": [0.5, 1.0], "offset": [-8, -8]}
    weight = np.array([[0.25, -0.75, 9], [0.5, -0.5, -9]], np.float32)
    assert np.array_equal(fake_quantize(weight, grid_of(entry)), [[0.5, -0.5, 3.5], [1, 0, -8]])
    entry = {"dtype": "INT", "bw": 8, "compressed_bw": 4, "enc_type": "LPBQ", "block_size": 2, "scale": [0.5],
             "offset": [-128], "per_block_int_scale": [1, 2]}  # fmt: skip
    weight = np.array([[0.6, -5, 0.6, -5]], np.float32)
    assert np.array_equal(fake_quantize(weight, grid_of(entry)), [[0.5, -4, 1, -5]])


def test_an_executor_is_an_executor(exports, tmp_path):
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    loop = Loop(Session(folder, PHONE, locked=False))
    [spec] = loop.specs
    inputs = read_arrays(folder, spec, "input", spec.inputs)
    other = inputs | {"input_ids": inputs["input_ids"] + 1}
    here = Engine("reference").run(folder / spec.name, [inputs, other])
    with LoopbackHub(engine="reference") as hub, Session(folder, PHONE, hub.url) as device:
        there = device.run(folder / spec.name, [inputs, other])
        assert hub.kinds() == {"compile": 1, "inference": 1}
        device.run(folder / spec.name, [inputs, other])
        assert hub.kinds() == {"compile": 1, "inference": 1}
    for a, b in zip(here, there, strict=True):
        assert list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(there[0]["logits"], there[1]["logits"])


# Kills


@pytest.fixture(scope="session")
def processes():
    """New processes that have everything imported, without this one's threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs a system that forks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["refimpl.cli", "export.hub.loop", "qai_hub", "h5py"])
    return context


def kill_at(processes, hub, folder, number, kind):
    """Runs the loop in a process, which is killed at its so-many-th request, before or after it was done."""
    start = hub.counts.total()
    process = processes.Process(
        target=main, args=(["hub", "infer", str(folder), "--device", PHONE, "--api-url", hub.url],)
    )

    def fault(method, route, n):
        return Fault(kind, then=process.kill) if n - start == number else None

    hub.fault = fault
    process.start()
    process.join(60)
    hub.fault = None
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode < 0


@pytest.mark.parametrize("kind", ["drop", "drop_after"])
def test_a_kill_at_any_request_costs_no_job(processes, exports, tmp_path, kind):
    """Killed at its 1st request, gone on with and killed at the 2nd, and so on: no job is submitted twice, no whole
    upload repeated."""
    with LoopbackHub(polls=0) as hub:
        folder = shutil.copytree(exports["one"], tmp_path / "fresh")
        assert act(hub, "infer", folder) == 0
        fresh, jobs = hub.counts.total(), hub.kinds()
        bytes_fresh = hub.uploaded["models"]
    with LoopbackHub(polls=0) as hub:
        folder = shutil.copytree(exports["one"], tmp_path / "killed")
        kills = 0
        while kill_at(processes, hub, folder, kills + 1, kind):
            kills += 1
        assert kills > 8
        assert hub.kinds() == jobs
        whole = [m for m in hub.models.values() if m.proto.file_upload_complete]
        data = [d for d in hub.datasets.values() if d.proto.file_upload_complete]
        assert len(whole) == 1 and len(data) == 2
        assert (folder / "outputs/loopback-phone/isolated").is_dir()
        print(f"fresh: {fresh} requests, {bytes_fresh} bytes; with {kills} kills: {hub.counts.total()} requests, "
              f"{hub.uploaded['models']} bytes")  # fmt: skip


def test_a_ledger_cut_anywhere_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand of them take a while
    with Ledger(tmp_path) as ledger:
        ledger.write("a", kind="model", label="g", name="n-1", id=None)
        ledger.write("a", id="m1")
        ledger.write("b", kind="compile", label="g", name="诗", id=None)
    data = (tmp_path / FILE).read_bytes()
    for cut in range(len(data) + 1):
        (tmp_path / FILE).write_bytes(data[:cut])
        with Ledger(tmp_path) as ledger:
            assert ledger.get("a").get("id") in (None, "m1")
            assert (ledger.get("a").get("id") == "m1") == (data[:cut].count(b"\n") >= 3)
            ledger.write("c", kind="link", label="p", id="j1")
        assert Ledger(tmp_path).get("c")["id"] == "j1"


@pytest.mark.parametrize("line", [
    b'{"key": 1}', b"[]", b"{", b'{"key": "a", "id": "../../x"}', b"\xff", b"[" * 100000,
    b'{"key": "a", "kind": "model", "label": "x\\u001b[31mevil"}', b'{"key": "a", "reason": "x\\n"}',
])  # fmt: skip
def test_a_damaged_ledger_is_refused(tmp_path, line):
    with Ledger(tmp_path) as ledger:
        ledger.write("a", kind="model", label="g", id="m1")
    with open(tmp_path / FILE, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=r"line 3 of .* is damaged"):
        Ledger(tmp_path)
    (tmp_path / FILE).write_bytes(line + b"\n")
    with pytest.raises(InputError, match="line 1 of"):
        Ledger(tmp_path)


def test_a_ledger_of_strangers(exports, tmp_path, monkeypatch):
    """Whatever stands in a field: what is read of it is an answer, or an error of one line."""
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub(polls=0) as hub:
        assert act(hub, "infer", folder) == 0
    loop = Loop(Session(folder, PHONE, hub.url, locked=False))
    [source] = loop.sources.values()
    monkeypatch.setattr(Source, "zipped", lambda self: 0)
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    refused = 0
    for i, line in enumerate(lines[1:], 1):
        for field in line.keys() - {"time", "client"}:
            for value in (None, 7, "../y", [], {"": [["a", "b"]]}, {"": [["a", "b", 3, 4, 5]]}, {"": 7}):
                changed = [*lines[:i], line | {field: value}, *lines[i + 1 :]]
                (folder / FILE).write_text("".join(json.dumps(one) + "\n" for one in changed))
                try:
                    assert str(status(folder)) is not None
                    loop.session.ledger = Ledger(folder)
                    loop.planned("compile")
                    loop.session.schema(loop.session.link_key([source]), source)
                except InputError as error:
                    refused += 1
                    assert "\n" not in str(error)
    assert refused > 100


def test_two_at_once(export, capsys):
    with LoopbackHub() as hub, Ledger(export):
        assert act(hub, "compile", export) == 2
        assert "another process works on" in capsys.readouterr().err
        assert not hub.counts
        assert act(hub, "status", export) == 0


# Faults


def at(route, fault, times=1):
    """The fault at the first requests of a route."""
    left = [times]

    def hook(method, path, number):
        if f"{method} {path}".startswith(route) and left[0]:
            left[0] -= 1
            return fault
        return None

    return hook


ROUTES = ["GET /devices/", "POST /models/", "GET /models/ID/multipart_upload/", "PUT /upload/models",
          "POST /models/ID/multipart_upload/", "POST /jobs/", "GET /jobs/ID/", "POST /datasets/",
          "GET /datasets/ID/upload_url/", "POST /upload/datasets", "PATCH /datasets/ID/", "GET /jobs/ID/result/",
          "GET /datasets/ID/download_data/", "GET /download/datasets/ID"]  # fmt: skip


@pytest.mark.parametrize("fault", [Fault("drop"), Fault("drop_after"), Fault("status", 503)], ids=str)
def test_passing_faults_pass(exports, tmp_path, fault):
    """One at each request that a session makes: it goes on, and ends as if nothing had been."""
    hooks = {route: at(route, fault) for route in ROUTES}

    def hook(method, path, number):
        return next((found for one in hooks.values() if (found := one(method, path, number))), None)

    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub(fault=hook) as hub:
        assert act(hub, "infer", folder) == 0
        assert all(any(known.startswith(route) for known in hub.counts) for route in ROUTES)


def test_a_long_outage_is_waited_for(exports, tmp_path, monkeypatch, capsys):
    """Longer than the client's own patience; no job is sent twice when only the answer was lost."""
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    monkeypatch.setattr(connection, "PATIENCE", 60.0)
    monkeypatch.setattr(connection.time, "sleep", lambda _: None)
    with LoopbackHub(fault=at("POST /jobs/", Fault("status", 429), 20)) as hub:
        assert act(hub, "infer", folder) == 0
        assert hub.kinds() == {"compile": 1, "link": 1, "inference": 1}
    assert f"no answer from {hub.url} to send compile" in capsys.readouterr().err, "without a terminal, too"


@pytest.mark.parametrize("accepts", [False, True])
def test_no_server_is_told_within_seconds(export, monkeypatch, capsys, accepts):
    """Neither where nothing listens nor where nothing answers, and meanwhile it is said what is waited for."""
    import requests

    asked = []

    def head(url, timeout, **options):
        asked.append(timeout)
        return ask(url, timeout=0.2, **options)

    ask = requests.head
    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(connection, "FIRST", 2.5)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        if not accepts:
            nobody.close()
        started = time.monotonic()
        assert main(["hub", "compile", str(export), "--device", PHONE, "--api-url", url]) == 2
    assert time.monotonic() - started < 5 and len(asked) > 1 and asked[0] == (5, 10)
    waiting, told = capsys.readouterr().err.splitlines()
    assert waiting == f"no connection to {url} yet; trying for 2 seconds"
    assert told.startswith(f"refimpl: no connection to {url}: ") and "is the address right" in told
    assert ("Connection refused" in told) != accepts and ("timed out" in told) == accepts


def test_a_lost_answer_is_looked_for(exports, tmp_path, monkeypatch):
    """The job was made, its answer lost, and then the network: when that is back, the job is found, not sent again."""
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    monkeypatch.setattr(connection, "PATIENCE", 60.0)
    monkeypatch.setattr(connection.time, "sleep", lambda _: None)
    lost, down = at("POST /jobs/", Fault("drop_after")), at("POST /jobs/", Fault("drop"), 6)
    with LoopbackHub(fault=lambda *request: lost(*request) or down(*request)) as hub:
        assert act(hub, "infer", folder) == 0
        assert hub.kinds() == {"compile": 1, "link": 1, "inference": 1}


@pytest.mark.parametrize(
    "route, fault, line",
    [
        ("", Fault("drop"), "no connection to http://127"),
        ("", Fault("status", 503), "no connection to http://127"),
        ("GET /devices/", Fault("garbage"), "it did not answer as AI Hub does; is there a proxy in between"),
        ("GET /jobs/ID/", Fault("garbage"), "it did not answer as AI Hub does"),
        ("POST /models/", Fault("status", 413, "Too Large"), "export more parts"),
        ("PUT /upload/models", Fault("status", 413, "Too Large"), "export more parts"),
        ("POST /jobs/", Fault("status", 400, '{"detail": "Options are wrong."}'), "Options are wrong."),
        ("POST /jobs/", Fault("status", 403, "no"), "AI Hub did not send compile"),
        ("POST /jobs/", Fault("status", 426, "Upgrade, please"), "Upgrade, please"),
        ("GET /download/datasets", Fault("garbage"), "prompt_ar4_cl12_1_of_1.h5 is damaged"),
        ("GET /download/datasets", Fault("status", 403, "<Code>Expired</Code>"), "AI Hub did not fetch"),
    ],
)
def test_a_lasting_fault_is_one_line(exports, tmp_path, capsys, route, fault, line):
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub(fault=at(route, fault, 10**9)) as hub:
        assert act(hub, "infer", folder) == 2
        told = capsys.readouterr().err
        assert line in told and told.startswith("refimpl: ") and told.count("\n") == 1, told
        assert not list(folder.rglob("*partial*"))
        hub.fault = None
        assert act(hub, "infer", folder) == 0
        assert hub.kinds() == {"compile": 1, "link": 1, "inference": 1}


def test_a_slow_answer_is_asked_for_again(exports, tmp_path, monkeypatch):
    import qai_hub.util.session

    monkeypatch.setattr(qai_hub.util.session, "EXTERNAL_RESPONSE_TIMEOUT_SECONDS", 0.2)
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    slow = Fault("slow", wait=threading.Event())
    with LoopbackHub(fault=at("PUT /upload/models", slow)) as hub:
        assert act(hub, "infer", folder) == 0
        assert hub.counts["PUT /upload/models/ID/0"] == 2
        slow.wait.set()


def test_what_ai_hub_refuses_is_not_uploaded(export, capsys):
    path = export / "token_ar1_cl12_2_of_3" / "notes.txt"
    path.write_text("AI Hub takes no other files")
    with LoopbackHub() as hub:
        assert act(hub, "compile", export) == 2
        told = capsys.readouterr().err
        assert "AI Hub refuses such a graph as token_ar1_cl12_2_of_3 (folder-extra-files: " in told
        assert "--unchecked sends it all the same" in told and told.count("\n") == 1 and not hub.counts
        path.unlink()
        assert act(hub, "compile", export) == 0


def test_status_looks_at_what_has_not_ended(export, capsys):
    with LoopbackHub(polls=0) as hub:
        with Session(export, PHONE, hub.url) as here:
            here.compile(next(iter(Loop(here).sources.values())))
        for more, state in ((), "sent"), (("--device", PHONE, "--api-url", hub.url), "done"), ((), "done"):
            assert main(["hub", "status", str(export), "--json", *more]) == 0
            assert [row["state"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["uploaded", state]


def test_a_failed_job_says_why_and_is_not_sent_again(export, capsys):
    def refuse(kind, name, options):
        return "Failed with exit code 14 -\n Conversion to context binary failed" if "_2_of_3" in options else None

    with LoopbackHub(refuse=refuse) as hub:
        for _ in range(2):
            assert act(hub, "infer", export) == 1
            lines = [x for x in capsys.readouterr().out.splitlines() if "failed (job" in x]
            assert len(lines) == 2 and lines[0].startswith("compile of prompt_ar4_cl12_2_of_3 failed (job j0")
            assert "exit code 14 - Conversion to context binary failed; likely an operation or a Reshape" in lines[0]
            assert hub.kinds()["compile"] == 6 and hub.kinds()["link"] == 2
        assert act(hub, "status", export) == 1
        hub.refuse = None
        models = len(hub.models)
        assert act(hub, "infer", export, "--retry") == 0
        assert hub.kinds()["compile"] == 8 and hub.kinds()["link"] == 3
        assert len(hub.models) == models + 3, "two compiled, one linked, none uploaded"


@pytest.mark.parametrize("reason", ["Non-identical quantization parameters", "QNN error 3110", "error 1002 in QNN",
                                    "Unsupported model IR version: 11", "op com.microsoft.MatMulNBits", "Device OOM",
                                    "dynamic shapes", "input is int64", "DSP arch version mismatch"])  # fmt: skip
def test_known_failures_have_a_cause(reason):
    assert likely(reason)


def test_expired_and_deleted_things_are_sent_again(exports, tmp_path):
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub(life=-1) as hub:
        assert act(hub, "infer", folder) == 2  # datasets that are dead on arrival
    folder = shutil.copytree(exports["one"], tmp_path / "y")
    with LoopbackHub() as hub:
        assert act(hub, "infer", folder) == 0
        shutil.rmtree(folder / "outputs")
        hub.datasets.clear()  # inputs and outputs, after 30 days
        assert act(hub, "infer", folder) == 0
        assert hub.kinds() == {"compile": 1, "link": 1, "inference": 2}
        hub.models.clear()
        shutil.rmtree(folder / "outputs")
        hub.datasets.clear()
        assert act(hub, "infer", folder) == 0
        assert hub.kinds()["compile"] == 2


@pytest.mark.parametrize(
    "route, fault, status",
    [("GET /jobs/ID/", Fault("status", 404, "<html><title>404 Not Found</title>nginx</html>"), 0),
     ("POST /jobs/", Fault("status", 400, '{"detail": "The framework was not found."}'), 2)],
)  # fmt: skip
def test_a_strangers_404_forgets_nothing(exports, tmp_path, monkeypatch, route, fault, status):
    """Only AI Hub's own word, asked for twice, is that something is gone: else a job would be sent a second time."""
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    monkeypatch.setattr(connection, "PATIENCE", 60.0)
    monkeypatch.setattr(connection.time, "sleep", lambda _: None)
    with LoopbackHub(polls=0) as hub:
        assert act(hub, "compile" if status else "link", folder) == 0
        path, jobs = folder / FILE, hub.kinds()
        lines = path.read_text().splitlines(keepends=True)
        if not status:  # killed before it was seen that the jobs had ended
            path.write_text("".join(line for line in lines if '"state": "done"' not in line))
        known = {key: entry["id"] for key, entry in Ledger(folder).entries.items()}
        hub.fault = at(route, fault)
        assert act(hub, "link", folder) == status
        assert hub.kinds() == jobs
        now = Ledger(folder).entries
        assert {key: now[key]["id"] for key in known} == known


def test_a_changed_graph_is_sent_and_the_rest_is_not(export):
    with LoopbackHub() as hub:
        act(hub, "link", export)
        assert hub.kinds() == {"compile": 6, "link": 3}
        path = export / "prompt_ar4_cl12_2_of_3" / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        model.producer_version += "+"
        path.write_bytes(model.SerializeToString())
        act(hub, "link", export)
        assert hub.kinds() == {"compile": 7, "link": 4}
        zips = [zipfile.ZipFile(io.BytesIO(m.data)).namelist() for m in hub.models.values() if not m.proto.producer_id]
        assert sorted(zips[1]) == [f"prompt_ar4_cl12_2_of_3.onnx/{name}" for name in ("", "model.data", "model.onnx")]
        act(hub, "link", export, "--qairt", "2.50")
        assert hub.kinds() == {"compile": 13, "link": 7}
        assert sum(m.proto.producer_id == "" for m in hub.models.values()) == 7, "uploaded once each"


def test_fetch_takes_what_was_sent(exports, tmp_path, capsys):
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub() as hub:
        assert act(hub, "infer", folder, "--qairt", "2.50") == 0
        assert act(hub, "fetch", folder) == 2
        assert "nothing was sent to http" in capsys.readouterr().err
        assert len(list(folder.rglob("*.h5"))) == 2
        shutil.rmtree(folder / "outputs")
        assert act(hub, "fetch", folder, "--qairt", "2.50") == 0
        assert len(list(folder.rglob("*.h5"))) == 2


def test_modules_alone_have_no_chain(tiny_model, tmp_path, capsys):
    saved = emit(tiny_model("Baichuan2-7B"), tokens=(4, 1), context=12, graphs=["model.layers.1.mlp"])
    folder = saved.save(tmp_path / "x")
    with LoopbackHub() as hub:
        assert act(hub, "infer", folder) == 0
        assert hub.kinds() == {"compile": 2, "link": 1, "inference": 2}
    assert read_device(folder, folder / "outputs" / "loopback-phone")


def test_outputs_of_an_earlier_export_go(exports, tmp_path):
    """A job that fails leaves no outputs of the graph that was there before."""
    folder = shutil.copytree(exports["two"], tmp_path / "x")
    with LoopbackHub() as hub:
        assert act(hub, "infer", folder) == 0
        paths = sorted(folder.rglob("*.h5"))
        assert len(paths) == 4
        hub.refuse = lambda kind, name, options: "no" if "2_of_2" in options and kind == "inference" else None
        assert act(hub, "infer", folder, "--run-options=--max_profiler_iterations 1") == 1
        assert [path for path in paths if path.exists()] == [path for path in paths if "1_of_2" in path.name]


def test_a_wrong_tensor_arrives_as_it_is(exports, tmp_path):
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub(spoil=lambda graph, outputs: outputs | {"logits": outputs["logits"] + 1}) as hub:
        assert act(hub, "infer", folder) == 0
        loop = Loop(Session(folder, PHONE, hub.url, locked=False))
        [spec] = loop.specs
        path = folder / "outputs" / "loopback-phone" / "isolated" / f"{spec.name}.h5"
        [got] = named_outputs(path, loop.sources[spec.name], 1)
        golden = read_arrays(folder, spec, "output", spec.outputs)
        assert np.abs((got["logits"] - golden["logits"])[0, -spec.real :] - 1).max() < 1e-4
    assert main(["verify", str(folder), str(folder / "outputs" / "loopback-phone")]) == 1


@pytest.mark.parametrize(
    "spoil, line",
    [
        (lambda o: {k: v for k, v in o.items() if k != "logits"}, "AI Hub gave 4 outputs of .*, the graph has 5"),
        (lambda o: o | {"logits": o["logits"][..., :-1]}, r"gave logits of .* as \(1, 4, 95\), expected \(1, 4, 96\)"),
        (lambda o: o | {"more": np.zeros((1, 4, 9000), np.float32)}, "gave 6 outputs of .*, the graph has 5"),
    ],
)
def test_outputs_that_are_not_the_graph_s(exports, tmp_path, capsys, spoil, line):
    folder = shutil.copytree(exports["one"], tmp_path / "x")
    with LoopbackHub(spoil=lambda graph, outputs: spoil(outputs)) as hub:
        assert act(hub, "infer", folder) == 2
    assert re.search(line, capsys.readouterr().err)


def link(place, dims, elsewhere):
    place["batch_0"] = h5py.ExternalLink(elsewhere, "/x")


def external(place, dims, elsewhere):
    place.create_dataset("batch_0", dims, "f4", external=[(elsewhere, 0, h5py.h5f.UNLIMITED)])


def virtual(place, dims, elsewhere):
    layout = h5py.VirtualLayout(dims, "f4")
    layout[...] = h5py.VirtualSource(elsewhere, "x", dims)
    place.create_virtual_dataset("batch_0", layout)


def wide(place, dims, elsewhere):
    place.create_dataset("batch_0", dims, "V400000")


@pytest.mark.parametrize(
    "store, line",
    [
        (link, "links to it elsewhere"),
        (external, "kept in other files"),
        (virtual, "kept in other files"),
        (wide, "expected real numbers"),
    ],
)
def test_outputs_that_lie_elsewhere_are_not_read(exports, tmp_path, store, line):
    """What AI Hub answers goes back to it along the chain: it must not be able to name files of this machine."""
    [graph] = [folder for folder in exports["one"].iterdir() if (folder / "model.onnx").is_file()]
    source, secret = Source.read(graph), tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.full(source.outputs["logits"], 42, np.float32)
    with h5py.File(tmp_path / "answer.h5", "w") as file:
        for i, (name, dims) in enumerate(source.outputs.items()):
            place = file.create_group(f"data/{i}")
            place.attrs["name"], place.attrs["order"], place.attrs["batch_count"] = name, i, 1
            if name == "logits":
                store(place, dims, str(secret))
            else:
                place["batch_0"] = np.zeros(dims, np.float32)
    with pytest.raises(InputError, match=line):
        named_outputs(tmp_path / "answer.h5", source, 1)


@pytest.mark.parametrize("specs, sanitized", [(True, True), (True, False), (False, False)])
def test_names_of_the_server(exports, tmp_path, specs, sanitized):
    folder = shutil.copytree(exports["two"], tmp_path / "x")
    with LoopbackHub(specs=specs, sanitized=sanitized) as hub:
        assert act(hub, "infer", folder) == 0


def test_inputs_go_in_the_order_of_the_compiled_model(exports, tmp_path, monkeypatch, capsys):
    """A compiler may reorder them: the server's order counts. Other inputs are refused."""
    from loopback_hub import Graph

    turned, unpack = [lambda ends: ends[::-1]], Graph.unpack.__func__

    def unpacked(cls, *arguments):
        graph = unpack(cls, *arguments)
        graph.inputs, graph.names = turned[0](graph.inputs), turned[0](graph.names)
        return graph

    monkeypatch.setattr(Graph, "unpack", classmethod(unpacked))
    with LoopbackHub() as hub:
        assert act(hub, "infer", shutil.copytree(exports["one"], tmp_path / "x")) == 0
        turned[0] = lambda ends: ends[1:]
        assert act(hub, "infer", shutil.copytree(exports["one"], tmp_path / "y"), "--qairt", "2") == 2
    assert "AI Hub's model of prompt_ar4_cl12_1_of_1 takes attention_mask (1, 1, 4, 12), " in capsys.readouterr().err


def test_the_device_is_asked_for_first(export, capsys):
    with LoopbackHub() as hub:
        assert act(hub, "compile", export, device="Loopback Fone") == 2
        assert "AI Hub has no device 'Loopback Fone'; it has Loopback Phone" in capsys.readouterr().err
        assert act(hub, "compile", export, device="Loopback Classic") == 2
        assert "does not run QNN models" in capsys.readouterr().err
        assert not posts(hub)


def test_other_weights_than_were_exported_are_not_uploaded(export, capsys):
    path = export / "token_ar1_cl12_2_of_3" / "model.data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with LoopbackHub() as hub:
        assert act(hub, "compile", export, "--unchecked") == 2
        assert "token_ar1_cl12_2_of_3 was changed after its export; export again" in capsys.readouterr().err


# Access


def test_without_a_token(export, capsys, tmp_path):
    for text in (
        None,
        "",
        "[api]\n",
        "garbage",
        "[api]\napi_token=\napi_url=https://x.example\nweb_url=https://x.example\n",
    ):
        if text is not None:
            (tmp_path / "client.ini").write_text(text)
        assert main(["hub", "compile", str(export), "--device", PHONE, "--api-url", "https://x.example"]) == 2
        told = capsys.readouterr().err
        assert (
            told.startswith("refimpl: no token for AI Hub: ") and told.count("\n") == 1 and "qai-hub configure" in told
        )


def test_the_token_stays_safe(export, capsys, tmp_path):
    ini = "[api]\napi_token = secret-token\napi_url = https://x.example\nweb_url = https://x.example\n"
    (tmp_path / "client.ini").write_text(ini)
    assert main(["hub", "compile", str(export), "--device", PHONE, "--api-url", "http://y.example"]) == 2
    assert "is not encrypted" in capsys.readouterr().err
    seen = []
    with LoopbackHub(fault=lambda *_: seen.append(1)) as hub:  # which takes no token but its own
        assert act(hub, "compile", export) == 0
    assert "secret-token" not in (export / FILE).read_text()
    assert main(["hub", "compile", str(export), "--device", PHONE, "--api-url", "ftp://y"]) == 2


def test_a_wrong_token(export, capsys, tmp_path):
    with LoopbackHub() as hub:
        hub.client_ini(tmp_path / "client.ini", "wrong")
        assert act(hub, "compile", export) == 2
        told = capsys.readouterr().err
        assert "is not valid at" in told and told.count("\n") == 1
        hub.client_ini(tmp_path / "client.ini")
        assert main(["hub", "compile", str(export), "--device", PHONE]) == 0


def test_a_dry_run_sends_nothing(export, capsys):
    with LoopbackHub() as hub:
        assert act(hub, "infer", export, "--dry-run") == 0
        told = capsys.readouterr().out
        assert not hub.counts and not (export / FILE).exists()
        assert "model     prompt_ar4_cl12_1_of_3" in told and "context_enable_graphs=token_ar1_cl12_3_of_3" in told
        assert "uploads of" in told and "0 were sent before" in told
        act(hub, "compile", export)
        capsys.readouterr()
        assert act(hub, "compile", export, "--dry-run", "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert all(row["sent"] for row in rows) and len(rows) == 12
        assert 0.1 < rows[0]["zipped"] / rows[0]["bytes"] < 1.01


def test_nothing_is_left_in_the_temporary_folder(exports, tmp_path, monkeypatch):
    """The client leaves the zip of each upload behind, which has gigabytes."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with LoopbackHub() as hub:
        hub.scratch, mine = tmp_path / "hub", hub.scratch
        shutil.rmtree(mine)
        assert act(hub, "infer", shutil.copytree(exports["one"], tmp_path / "x")) == 0
    assert not list((tmp_path / "tmp").iterdir())


def test_options_are_the_user_s():
    assert Options(qairt="").for_link() == ""
    assert Options(run="--x").for_profile("g").endswith("context_enable_graphs=g --x --max_profiler_iterations 50")


@pytest.mark.parametrize(
    "more",
    [("status",), ("status", "--device", PHONE), ("compile", "--device", PHONE), ("fetch", "--device", PHONE),
     ("compile", "--device", PHONE, "--dry-run")],
)  # fmt: skip
def test_an_export_that_is_none(tmp_path, capsys, more):
    for folder, what in ((tmp_path / "no", "is not a folder"), (tmp_path, "has no manifest.json")):
        assert main(["hub", more[0], str(folder), *more[1:]]) == 2
        told = capsys.readouterr()
        assert f"{folder} {what}; expected an export" in told.err and told.err.count("\n") == 1 and not told.out
        assert not list(tmp_path.iterdir()), "nothing is written into it"


def test_the_status_of_what_was_never_sent(export, capsys):
    assert main(["hub", "status", str(export)]) == 0
    assert capsys.readouterr().out == "nothing was sent yet\n"
