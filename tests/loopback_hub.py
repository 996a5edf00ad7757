"""A loopback AI Hub: HTTP and protobuf as the unmodified client speaks them, on a port of its own.

It takes uploads, compiles, links and runs: graphs are executed for real, on the grids of their `model.encodings`, as a
quantized device would (weights, inputs, outputs and all between). What a test may ask of it:

    fault    (method, route, number) -> None, or what goes wrong with that request: a Fault
    refuse   (kind, name, options) -> None, or the reason for which that job fails
    spoil    (graph, outputs) -> outputs: what a device with a bug would give
    polls    how often a job is looked at before it is done
    half     whether graphs without encodings are computed in float16, which is a device's own; onnxruntime
             has no such sums, and leaves casts out, so that is done to the letter by engine="reference" alone
    specs    whether models tell the names, shapes and grids of their ends; sanitized, whether names lose their dots

`counts` has the requests by route, `jobs`, `models` and `datasets` what there is. It knows nothing of the product.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import h5py
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from qai_hub import public_api_pb2 as pb
from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5, h5_to_dataset_entries
from requests_toolbelt import MultipartDecoder

TOKEN = "loopback"
LARGEST = 256 << 20  # bytes of a body, and of what a zip unfolds to
PART = 1 << 18  # bytes of a part of an upload, small so that there are several
PHONE = ("Loopback Phone", "15", ["framework:qnn", "os:android", "hexagon:v79", "htp-supports-weight-sharing:true"])
OLD_PHONE = ("Loopback Classic", "9", ["framework:tflite", "os:android"])
DTYPES = {"float32": pb.TENSOR_DTYPE_FLOAT32, "int32": pb.TENSOR_DTYPE_INT32, "int64": pb.TENSOR_DTYPE_INT64,
          "uint8": pb.TENSOR_DTYPE_UINT8, "uint16": pb.TENSOR_DTYPE_UINT16}  # fmt: skip
OPTIONS = {
    "compile": {
        "target_runtime",
        "qairt_version",
        "output_names",
        "quantize_io",
        "qnn_options",
        "quantize_full_type",
        "truncate_64bit_io",
    },
    "link": {"qairt_version"},
    "inference": {"qairt_version", "qnn_options", "max_profiler_iterations"},
}


@dataclass
class Fault:
    """What goes wrong with a request: its `kind`, and what that needs."""

    kind: str  # drop: no answer; drop_after: the same once it was done; status; garbage: no protobuf; slow
    status: int = 500
    text: str = ""
    wait: threading.Event | None = None  # slow: until then, or for ten seconds
    then: Callable[[], None] | None = None  # called when it happens, to kill somebody, say


class RejectedError(Exception):
    """A job fails, and this is why."""


@dataclass
class Stored:
    """A model, dataset or job: its protobuf, what was uploaded or made for it, and how often it was looked at."""

    proto: object
    data: bytes = b""
    parts: dict[int, bytes] = field(default_factory=dict)
    graphs: dict[str, Graph] = field(default_factory=dict)
    looks: int = 0
    kind: str = ""
    created: float = 0.0


class LoopbackHub:
    """The server, as a context: `url` while it runs."""

    def __init__(
        self,
        fault=None,
        refuse=None,
        spoil=None,
        polls=1,
        specs=True,
        sanitized=True,
        engine="auto",
        life=30,
        half=False,
    ):
        self.fault, self.refuse, self.spoil, self.polls = fault, refuse, spoil, polls
        self.specs, self.sanitized, self.engine, self.life, self.half = specs, sanitized, engine, life, half
        self.counts: Counter[str] = Counter()
        self.uploaded = Counter()  # bytes that came in, by kind
        self.models: dict[str, Stored] = {}
        self.datasets: dict[str, Stored] = {}
        self.jobs: dict[str, Stored] = {}
        self.lock = threading.RLock()
        self.scratch = Path(tempfile.mkdtemp(prefix="loopback-hub-"))

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def client_ini(self, path: Path, token: str = TOKEN) -> Path:
        """A client.ini for this server."""
        lines = ["[api]", f"api_token = {token}", f"api_url = {self.url}", f"web_url = {self.url}", "verbose = False"]
        path.write_text("\n".join(lines) + "\n")
        return path

    def kinds(self) -> Counter[str]:
        """How many jobs of each kind there are."""
        return Counter(job.kind for job in self.jobs.values())

    # Requests: (method, pattern) -> what answers. A pattern's group is an id.

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, content_type: str):
        """What a request gives: a protobuf, or bytes."""
        for verb, pattern, name in ROUTES:
            if verb == method and (found := re.fullmatch(pattern, path)):
                with self.lock:
                    return getattr(self, name)(*found.groups(), query=query, body=body, content_type=content_type)
        raise LookupError(path)

    def get_devices(self, query, **_):
        devices = [pb.Device(name=name, os=os, attributes=attributes) for name, os, attributes in (PHONE, OLD_PHONE)
                   if query.get("name", "") in ("", name)]  # fmt: skip
        return pb.DeviceList(devices=devices, total_query_count=len(devices))

    def get_frameworks(self, **_):
        return pb.FrameworkList(frameworks=[pb.Framework(name="QAIRT", api_version="2.42", full_version="2.42.0")])

    def create(self, table: dict[str, Stored], letter: str, stored: Stored):
        number = f"{letter}{len(table) + 1:06d}"
        stored.created = time.time()
        table[number] = stored
        response = pb.CreateUpdateResponse(id=number)
        response.creation_time.GetCurrentTime()
        if letter == "d":
            response.expiration_time.FromSeconds(int(stored.created + self.life * 86400))
        return response

    def page(self, table: dict[str, Stored], query) -> list[tuple[str, Stored]]:
        newest = list(table.items())[::-1]
        start = int(query.get("offset", 0))
        return newest[start : start + int(query.get("limit", 50))]

    def post_model(self, body, **_):
        return self.create(self.models, "m", Stored(pb.Model.FromString(body)))

    def list_models(self, query, **_):
        found = [self.get_model(number) for number, _ in self.page(self.models, query)]
        return pb.ModelList(models=found, total_query_count=len(self.models))

    def get_model(self, number, **_):
        stored = self.models[number]
        proto = pb.Model()
        proto.CopyFrom(stored.proto)
        proto.model_id = number
        proto.creation_time.FromSeconds(int(stored.created))
        for name, graph in stored.graphs.items() if self.specs else ():
            for ends, mine in ((graph.inputs, proto.input_spec), (graph.outputs, proto.output_spec)):
                for end in ends:
                    mine.types.append(end.proto(name if len(stored.graphs) > 1 else None))
        return proto

    def model_upload_urls(self, number, query, **_):
        count = max(1, -(-int(query["file_size"]) // PART))
        urls = [f"{self.url}/upload/models/{number}/{i}" for i in range(count)]
        return pb.FileUploadResponse(
            multipart_url=pb.FileMultipartUploadURL(urls=urls, upload_id=number, max_part_size=PART)
        )

    def put_part(self, number, part, body, **_):
        self.models[number].parts[int(part)] = body
        self.uploaded["models"] += len(body)
        return b""

    def complete_model(self, number, **_):
        stored = self.models[number]
        if stored.proto.file_upload_complete:  # again, because the answer was lost
            return pb.CreateUpdateResponse(id=number)
        stored.data = b"".join(stored.parts[i] for i in sorted(stored.parts))
        stored.proto.file_upload_complete = True
        stored.parts = {}
        return pb.CreateUpdateResponse(id=number)

    def model_download_url(self, number, **_):
        name = {pb.MODEL_TYPE_QNN_DLC: "model.dlc", pb.MODEL_TYPE_QNN_CONTEXT_BINARY: "model.bin"}
        url = pb.FileDownloadURL(url=f"{self.url}/download/models/{number}",
                                 filename=name.get(self.models[number].proto.model_type, "model.zip"))  # fmt: skip
        return pb.FileDownloadResponse(url=url)

    def download_model(self, number, **_):
        return self.models[number].data

    def post_dataset(self, body, **_):
        return self.create(self.datasets, "d", Stored(pb.Dataset.FromString(body)))

    def list_datasets(self, query, **_):
        found = [self.get_dataset(number) for number, _ in self.page(self.datasets, query)]
        return pb.DatasetList(datasets=found, total_query_count=len(self.datasets))

    def get_dataset(self, number, **_):
        stored = self.datasets[number]
        proto = pb.Dataset()
        proto.CopyFrom(stored.proto)
        proto.dataset_id = number
        proto.creation_time.FromSeconds(int(stored.created))
        proto.expiration_time.FromSeconds(int(stored.created + self.life * 86400))
        return proto

    def dataset_upload_url(self, number, **_):
        fields = {"key": f"datasets/{number}"}
        url = pb.FileUploadURL(url=f"{self.url}/upload/datasets/{number}", file_field_name="file", fields=fields)
        return pb.FileUploadResponse(url=url)

    def upload_dataset(self, number, body, content_type, **_):
        parts = MultipartDecoder(body, content_type).parts
        [data] = [part.content for part in parts if b'name="file"' in part.headers[b"Content-Disposition"]]
        self.datasets[number].data = data
        self.uploaded["datasets"] += len(data)
        return b""

    def patch_dataset(self, number, **_):
        self.datasets[number].proto.file_upload_complete = True
        return pb.CreateUpdateResponse(id=number)

    def dataset_download_url(self, number, **_):
        url = pb.FileDownloadURL(url=f"{self.url}/download/datasets/{number}", filename="dataset.h5")
        return pb.FileDownloadResponse(url=url)

    def download_dataset(self, number, **_):
        return self.datasets[number].data

    def post_job(self, body, **_):
        proto = pb.Job.FromString(body)
        kind = proto.WhichOneof("job").removesuffix("_job")
        if kind == "inference" and proto.inference_job.dataset.dataset_id:
            self.alive(proto.inference_job.dataset.dataset_id)
        stored = Stored(proto, kind=kind)
        response = self.create(self.jobs, "j", stored)
        job = getattr(proto, f"{kind}_job")
        setattr(job, f"{kind}_job_id", response.id)
        job.job_state = pb.JOB_STATE_CREATED
        job.creation_time.CopyFrom(response.creation_time)
        if kind == "compile" and job.devices.devices:
            job.device.CopyFrom(job.devices.devices[0])
        if kind in ("compile", "link"):
            made = pb.MODEL_TYPE_QNN_DLC if kind == "compile" else pb.MODEL_TYPE_QNN_CONTEXT_BINARY
            model = pb.Model(name=f"{job.name}-target", model_type=made, producer_id=response.id)
            self.create(self.models, "m", Stored(model))
            model.model_id = list(self.models)[-1]
            job.target_model.CopyFrom(model)
        return response

    def alive(self, number: str) -> Stored:
        stored = self.datasets.get(number)
        if stored is None or time.time() > stored.created + self.life * 86400:
            raise LookupError(f"Dataset ID '{number}' could not be found. It may not exist or have expired.")
        return stored

    def get_job(self, number, **_):
        stored = self.jobs[number]
        job = getattr(stored.proto, f"{stored.kind}_job")
        if job.job_state in (pb.JOB_STATE_DONE, pb.JOB_STATE_FAILED):
            return stored.proto
        stored.looks += 1
        if stored.looks <= self.polls:
            running = {"compile": pb.JOB_STATE_OPTIMIZING_MODEL, "link": pb.JOB_STATE_LINKING_MODELS}
            job.job_state = running.get(stored.kind, pb.JOB_STATE_PROVISIONING_DEVICE)
            return stored.proto
        try:
            if self.refuse and (reason := self.refuse(stored.kind, job.name, job.options)):
                raise RejectedError(reason)
            getattr(self, stored.kind)(stored, job)
            job.job_state = pb.JOB_STATE_DONE
        except RejectedError as error:
            job.job_state, job.failure_reason = pb.JOB_STATE_FAILED, str(error)
        return stored.proto

    def list_jobs(self, query, **_):
        summaries = []
        for number, stored in self.page(self.jobs, query):
            if query.get("type", stored.kind) != stored.kind:
                continue
            job, summary = getattr(stored.proto, f"{stored.kind}_job"), pb.JobSummary()
            part = getattr(summary, f"{stored.kind}_job_summary")
            part.job_id, part.name, part.job_state = number, job.name, job.job_state
            part.creation_time.CopyFrom(job.creation_time)
            summaries.append(summary)
        return pb.JobSummaryList(job_summaries=summaries, total_query_count=len(self.jobs))

    def job_result(self, number, **_):
        stored = self.jobs[number]
        if stored.kind != "inference":
            return pb.JobResult()
        result = pb.InferenceJobResult(inference_job_id=number, output_dataset_id=stored.data.decode())
        if stored.proto.inference_job.is_profiling_on:
            detail = pb.ProfileDetail(execution_time=1234, major_version=1, minor_version=2, all_execution_times=[1234])
            detail.layer_details.add(name="MatMul_0", layer_type_name="MatMul", compute_unit=pb.COMPUTE_UNIT_NPU)
            result.detail.CopyFrom(detail)
        return pb.JobResult(inference_job_result=result)

    # What jobs do

    def options(self, job, kind: str) -> dict[str, str]:
        words, found, last = shlex.split(job.options), {}, ""
        for word in words:
            if word.startswith("--"):
                last = word[2:]
                if last not in OPTIONS[kind]:
                    raise RejectedError(f"Unrecognized option --{last}")
                found[last] = ""
            else:
                found[last] = word
        return found

    def compile(self, stored: Stored, job) -> None:
        options, source = self.options(job, "compile"), self.models[job.model.model_id]
        if not source.proto.file_upload_complete:
            raise RejectedError("The model file is missing.")
        if options.get("target_runtime") != "qnn_dlc":
            raise RejectedError(f"Unsupported target runtime {options.get('target_runtime')}")
        name = options.get("qnn_options", "").removeprefix("context_enable_graphs=") or "graph"
        graph = Graph.unpack(source.data, self.scratch / f"{job.compile_job_id}", name, options, self)
        target = self.models[job.target_model.model_id]
        target.graphs, target.data = {name: graph}, f"dlc {name}".encode()
        for end in graph.inputs:
            job.target_tensor_type_list.types.append(end.proto(None))

    def link(self, stored: Stored, job) -> None:
        self.options(job, "link")
        target = self.models[job.target_model.model_id]
        for model in job.models.models:
            source = self.models[model.model_id]
            if not source.graphs:
                raise RejectedError("An input model was not compiled.")
            if target.graphs.keys() & source.graphs.keys():
                raise RejectedError("Graph names of linked models must differ.")
            target.graphs |= source.graphs
        target.data = ("context " + " ".join(target.graphs)).encode()

    def inference(self, stored: Stored, job) -> None:
        options, graphs = self.options(job, "inference"), self.models[job.model.model_id].graphs
        name = options.get("qnn_options", "").removeprefix("context_enable_graphs=") or next(iter(graphs), "")
        if name not in graphs:
            raise RejectedError(f"Graph {name} is not in the model, which has {', '.join(graphs)}")
        if not job.dataset.dataset_id:
            return
        with h5py.File(io.BytesIO(self.alive(job.dataset.dataset_id).data)) as file:
            entries = h5_to_dataset_entries(file)
        results = graphs[name].run(entries)
        if self.spoil:
            results = [self.spoil(name, result) for result in results]
        data = io.BytesIO()
        columns = {key: [result[key] for result in results] for key in results[0]}
        with h5py.File(data, "w") as file:
            dataset_entries_to_h5(columns, file)
        made = Stored(pb.Dataset(name=f"{job.name}-output", file_upload_complete=True), data.getvalue())
        stored.data = self.create(self.datasets, "d", made).id.encode()


API = "/api/v1(?:/projects/[^/]+)?"
ROUTES = [
    ("GET", f"{API}/devices/", "get_devices"),
    ("GET", f"{API}/frameworks/", "get_frameworks"),
    ("POST", f"{API}/models/", "post_model"),
    ("GET", f"{API}/models/", "list_models"),
    ("GET", f"{API}/models/(m\\d+)/", "get_model"),
    ("GET", f"{API}/models/(m\\d+)/multipart_upload/", "model_upload_urls"),
    ("PUT", "/upload/models/(m\\d+)/(\\d+)", "put_part"),
    ("POST", f"{API}/models/(m\\d+)/multipart_upload/", "complete_model"),
    ("GET", f"{API}/models/(m\\d+)/download/", "model_download_url"),
    ("GET", "/download/models/(m\\d+)", "download_model"),
    ("POST", f"{API}/datasets/", "post_dataset"),
    ("GET", f"{API}/datasets/", "list_datasets"),
    ("GET", f"{API}/datasets/(d\\d+)/", "get_dataset"),
    ("GET", f"{API}/datasets/(d\\d+)/upload_url/", "dataset_upload_url"),
    ("POST", "/upload/datasets/(d\\d+)", "upload_dataset"),
    ("PATCH", f"{API}/datasets/(d\\d+)/", "patch_dataset"),
    ("GET", f"{API}/datasets/(d\\d+)/download_data/", "dataset_download_url"),
    ("GET", "/download/datasets/(d\\d+)", "download_dataset"),
    ("POST", f"{API}/jobs/", "post_job"),
    ("GET", f"{API}/jobs/(j\\d+)/", "get_job"),
    ("GET", f"{API}/jobs/(j\\d+)/result/", "job_result"),
    ("GET", f"{API}/job_summaries/", "list_jobs"),
]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    timeout = 30

    def log_message(self, *_):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            if length > LARGEST:
                raise ValueError("too large")
            return self.rfile.read(length)
        data = bytearray()
        while size := int(self.rfile.readline(), 16):
            if len(data) + size > LARGEST:
                raise ValueError("too large")
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(data)

    def _answer(self) -> None:
        split = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        route = f"{self.command} {re.sub(r'[mdj][0-9]{6}', 'ID', split.path).removeprefix('/api/v1')}"
        with self.hub.lock:
            self.hub.counts[route] += 1
            number = self.hub.counts.total()
        try:
            body = self._body()
        except ValueError:
            return self._reply(413, b"the body is too large")
        fault = self.hub.fault(self.command, route.split(" ", 1)[1], number) if self.hub.fault else None
        if fault and fault.kind in ("drop", "status", "slow", "garbage"):
            if fault.then:
                fault.then()
            if fault.wait:
                fault.wait.wait(10)
            if fault.kind == "drop":
                return self._drop()
            if fault.kind == "status":
                return self._reply(fault.status, fault.text.encode())
            if fault.kind == "garbage":
                return self._reply(200, b"\xff<html>a proxy's page</html>", "application/x-protobuf")
        api = split.path.startswith("/api/")
        if api and self.headers.get("Authorization") != f"token {TOKEN}":
            return self._reply(401, b"Invalid token.")
        try:
            made = self.hub.answer(self.command, split.path, query, body, self.headers.get("Content-Type") or "")
        except LookupError as error:
            return self._reply(404, json.dumps({"detail": f"Not found: {error}"}).encode())
        if fault and fault.kind == "drop_after":
            if fault.then:
                fault.then()
            return self._drop()
        if api:
            self._reply(200, made.SerializeToString(), "application/x-protobuf")
        else:
            self._reply(200, made, "application/octet-stream")

    do_GET = do_POST = do_PUT = do_PATCH = _answer  # noqa: N815

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _reply(self, status: int, data: bytes, content_type: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"loopback"')
        self.end_headers()
        self.wfile.write(data)


# What a compiled graph is


@dataclass
class End:
    """An input or output of a compiled graph: the name that it has there, and its grid, if it is quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: Grid | None = None

    def proto(self, graph: str | None):
        kind = pb.TensorType(shape=self.shape, dtype=DTYPES[self.dtype])
        if self.grid:
            kind = pb.TensorType(shape=self.shape, dtype=DTYPES["uint8" if self.grid.bits == 8 else "uint16"])
            kind.scale, kind.zero_point = float(self.grid.scale[0]), -float(self.grid.offset[0])
        named = pb.NamedTensorType(name=self.name, tensor_type=kind)
        if graph:
            named.graph_name = graph
        return named


@dataclass
class Grid:
    """real = (code + offset) * scale, the code unsigned with so many bits; one scale, or one for each row or block."""

    bits: int
    scale: np.ndarray
    offset: np.ndarray
    block: int = 0
    steps: np.ndarray | None = None


@dataclass
class Graph:
    """A graph of a compiled model: its ends, and what opens it to be run."""

    name: str
    inputs: list[End]
    outputs: list[End]
    names: list[str]
    compute: Callable

    @classmethod
    def unpack(cls, data: bytes, folder: Path, name: str, options: dict[str, str], hub: LoopbackHub) -> Graph:
        """From an uploaded zip of a folder. Raises RejectedError for what AI Hub would not take."""
        try:
            archive = zipfile.ZipFile(io.BytesIO(data))
        except zipfile.BadZipFile:
            raise RejectedError("The uploaded file is no zip of a folder.") from None
        files = [info for info in archive.infolist() if not info.is_dir()]
        if sum(info.file_size for info in files) > LARGEST:
            raise RejectedError("The model is too large.")
        folder.mkdir(parents=True)
        for info in files:
            (folder / Path(info.filename).name).write_bytes(archive.read(info))
        [path] = [path for path in folder.iterdir() if path.suffix == ".onnx"]
        try:
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(path)
        except Exception as error:
            raise RejectedError(f"Failed to load the ONNX model: {error}") from None
        if model.ir_version > 10:
            raise RejectedError(f"Unsupported model IR version: {model.ir_version}, max supported IR version: 10")
        initializers = {i.name for i in model.graph.initializer}
        inputs = [v for v in model.graph.input if v.name not in initializers]
        for value in [*inputs, *model.graph.output]:
            if value.type.tensor_type.elem_type == TensorProto.INT64:
                raise RejectedError(f"Tensor {value.name} is int64; use --truncate_64bit_io")
        grids: dict[str, Grid] = {}
        for file in folder.glob("*.encodings"):
            grids = on_grids(model, json.loads(file.read_text()))
        if hub.half and not grids:
            in_half(model)
        wanted = [n for n in options.get("output_names", "").split(",") if n]
        if wanted and len(wanted) != len(model.graph.output):
            raise RejectedError(
                f"--output_names has {len(wanted)} names, the model has {len(model.graph.output)} outputs"
            )
        quantized = grids if "quantize_io" in options else {}
        ends = [
            End(re.sub(r"\W", "_", n) if hub.sanitized else n, tuple(d.dim_value for d in v.type.tensor_type.shape.dim),
                helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name, quantized.get(v.name))
            for values, names in ((inputs, [v.name for v in inputs]),
                                  (model.graph.output, wanted or [v.name for v in model.graph.output]))
            for v, n in zip(values, names, strict=True)
        ]  # fmt: skip
        shutil.rmtree(folder)
        compute = lru_cache(1)(lambda: opened(model, hub.engine))
        return cls(name, ends[: len(inputs)], ends[len(inputs) :], [v.name for v in inputs], compute)

    def run(self, entries: dict[str, list[np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """The outputs for each sample of a dataset, whose order, names, shapes and types are the graph's."""
        given = [(re.sub(r"\W", "_", name), arrays[0].shape) for name, arrays in entries.items()]
        mine = [(re.sub(r"\W", "_", end.name), end.shape) for end in self.inputs]
        if given != mine:
            raise RejectedError(f"The dataset's schema {given} does not match the model's {mine}")
        results = []
        for sample in zip(*entries.values(), strict=True):
            fed = {}
            for name, end, array in zip(self.names, self.inputs, sample, strict=True):
                if end.grid and array.dtype.kind == "u":  # codes
                    array = ((array + end.grid.offset) * end.grid.scale).astype(np.float32)
                if array.dtype != end.dtype:
                    raise RejectedError(f"Input {end.name} is {array.dtype}, expected {end.dtype}")
                fed[name] = array
            outputs = self.compute()(fed)
            results.append({end.name: array for end, array in zip(self.outputs, outputs, strict=True)})
        return results


def opened(model: onnx.ModelProto, engine: str) -> Callable:
    """What runs a model: inputs -> outputs in order."""
    if engine == "reference" or not find_spec("onnxruntime"):
        from onnx.reference import ReferenceEvaluator

        run = ReferenceEvaluator(model).run
    else:
        import onnxruntime

        run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run
    return lambda inputs: run(None, inputs)


def in_half(model: onnx.ModelProto) -> None:
    """Puts all inside of a graph in float16; its ends stay float32."""
    graph = model.graph
    ends = {v.name for v in [*graph.input, *graph.output] if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    for initializer in graph.initializer:
        if initializer.data_type == TensorProto.FLOAT:
            with np.errstate(over="ignore"):
                half = numpy_helper.to_array(initializer).astype(np.float16)
            initializer.CopyFrom(numpy_helper.from_array(half, initializer.name))
    for node in graph.node:
        node.input[:] = [f"{name}/half" if name in ends else name for name in node.input]
        node.output[:] = [f"{name}/half" if name in ends else name for name in node.output]
        for to in node.attribute:
            if node.op_type == "Cast" and to.name == "to" and to.i == TensorProto.FLOAT:
                to.i = TensorProto.FLOAT16
    given = [v.name for v in graph.input if v.name in ends]
    before = [helper.make_node("Cast", [name], [f"{name}/half"], to=TensorProto.FLOAT16) for name in given]
    after = [helper.make_node("Cast", [f"{v.name}/half"], [v.name], to=TensorProto.FLOAT)
             for v in graph.output if v.name in ends]  # fmt: skip
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def on_grids(model: onnx.ModelProto, content: dict) -> dict[str, Grid]:
    """Puts a graph on the grids of an encodings file of version 1.0.0: its weights, and every value that has one.

    Changes the model; returns the grids of values. Codes round half away from zero of the range, as AIMET has it.
    """
    graph = model.graph
    by_matmul = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for initializer in graph.initializer:
        for entry in content.get("param_encodings", ()):
            if entry["name"] == initializer.name and entry["dtype"] == "INT":
                weight = numpy_helper.to_array(initializer)
                turned = initializer.name in by_matmul and weight.ndim == 2
                fake = fake_quantize(weight.T if turned else weight, grid_of(entry))
                fake = np.ascontiguousarray(fake.T if turned else fake)
                initializer.CopyFrom(numpy_helper.from_array(fake, initializer.name))
    known = {e["name"]: grid_of(e) for e in content.get("activation_encodings", ()) if e["dtype"] == "INT"}
    produced = {name for node in graph.node for name in node.output}
    given = {value.name for value in graph.input}
    floats = {v.name for v in [*graph.input, *graph.output, *graph.value_info]
              if v.type.tensor_type.elem_type == TensorProto.FLOAT}  # fmt: skip
    nodes: list[onnx.NodeProto] = []
    replaced: dict[str, str] = {}
    for name in given & known.keys() & floats:
        nodes += round_trip(graph, name, f"{name}/on_grid", known[name])
        replaced[name] = f"{name}/on_grid"
    for node in graph.node:
        node.input[:] = [replaced.get(name, name) for name in node.input]
        after = []
        for i, name in enumerate(node.output):
            if name in known and name in produced and name in floats:
                node.output[i] = f"{name}/raw"
                after += round_trip(graph, f"{name}/raw", name, known[name])
        nodes += [node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return known


def grid_of(entry: dict) -> Grid:
    """An entry of an encodings file of version 1.0.0."""
    scale, offset = np.array(entry["scale"], np.float32), np.array(entry["offset"], np.float32)
    if entry["enc_type"] == "LPBQ":
        bits = entry["compressed_bw"]
        steps = np.array(entry["per_block_int_scale"], np.float32).reshape(len(scale), -1)
        return Grid(bits, scale, np.full_like(scale, -(2 ** (bits - 1))), entry["block_size"], steps)
    return Grid(entry["bw"], scale, offset, entry.get("block_size", 0))


def fake_quantize(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """A weight (rows, ...) as its codes stand for it."""
    rows = weight.shape[0]
    blocks = weight.reshape(rows, -1, grid.block) if grid.block else weight.reshape(rows, 1, -1)
    if grid.steps is not None:
        scale = (grid.scale[:, None] * grid.steps)[..., None]
        offset = np.broadcast_to(grid.offset[:, None, None], scale.shape)
    elif grid.scale.size == 1:
        scale, offset = grid.scale, grid.offset
    else:
        scale, offset = (part.reshape(rows, -1, 1) for part in (grid.scale, grid.offset))
    shifted = (blocks / scale - offset).astype(np.float32)
    below = np.floor(shifted)
    codes = np.clip(below + (shifted - below >= 0.5), 0, 2**grid.bits - 1)
    return (scale * (codes + offset)).astype(np.float32).reshape(weight.shape)


def round_trip(graph: onnx.GraphProto, source: str, target: str, grid: Grid) -> list[onnx.NodeProto]:
    """Nodes from a value to the same on its grid."""
    constants = {"scale": grid.scale[0], "offset": grid.offset[0], "half": 0.5, "low": 0.0, "high": 2.0**grid.bits - 1}
    names = {key: f"{target}/{key}" for key in constants}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.float32), names[k]) for k, v in constants.items())
    t = [f"{target}/{i}" for i in range(9)]
    return [
        helper.make_node("Div", [source, names["scale"]], [t[0]]),
        helper.make_node("Sub", [t[0], names["offset"]], [t[1]]),
        helper.make_node("Floor", [t[1]], [t[2]]),
        helper.make_node("Sub", [t[1], t[2]], [t[3]]),
        helper.make_node("GreaterOrEqual", [t[3], names["half"]], [t[4]]),
        helper.make_node("Cast", [t[4]], [t[5]], to=TensorProto.FLOAT),
        helper.make_node("Add", [t[2], t[5]], [t[6]]),
        helper.make_node("Clip", [t[6], names["low"], names["high"]], [t[7]]),
        helper.make_node("Add", [t[7], names["offset"]], [t[8]]),
        helper.make_node("Mul", [t[8], names["scale"]], [target]),
    ]
