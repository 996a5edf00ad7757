"""`check_bundle`: anybody's bundle, before it is on a phone: what Genie refuses, and what it accepts silently.

Genie itself is asked, where it can run the binaries. But it compares little: the rope-theta of another model, a
vocabulary of ten words, a `bos-token` that the tokenizer never writes, all are accepted and become bad text. So the
configuration, the model's config.json, the tokenizer and the graphs inside the binaries are compared with each other.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.files.graph_folder import CACHE
from export.phone.binary import Binary, CompiledGraph, Tensor, read_binary
from export.run.genie import CONFIG, Genie
from export.run.library import library
from export.run.socs import SOCS
from refimpl.config import Config, read_config
from refimpl.errors import InputError
from refimpl.files import read_json

HIDES = -20.0  # a mask of this much makes a probability exactly 0 on the NPU; less may leave some


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where it stands, what is and what was expected, what to do."""

    rule: str
    where: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.why}\n    do: {self.remedy}"


@dataclass(frozen=True)
class BundleCheck:
    """The faults that were found; true if there are none. `remarks` say what could not be looked at."""

    folder: str
    faults: tuple[Fault, ...]
    remarks: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        found = f"{len(self.faults)} fault{'s' * (len(self.faults) > 1)}" if self.faults else "nothing wrong"
        return "\n".join([*map(str, self.faults), *self.remarks, f"{found} found in {self.folder}"])

    def to_json(self) -> str:
        """The same, for a machine."""
        return json.dumps({**asdict(self), "agrees": bool(self)}, ensure_ascii=False)


class _Bundle:
    """The files of a bundle; `lost` are the faults of those that are missing or cannot be read.

    `read`: whether the binaries are read, which needs Qualcomm's library.
    """

    def __init__(self, folder: Path, read: bool = True):
        self.folder = folder
        self.dialog: dict[str, Any] = read_json(folder / CONFIG).get("dialog", {})
        self.lost: list[Fault] = []
        try:
            self.context = self.dialog["context"]
            self.engine = self.dialog["engine"]
            self.htp = self.engine["backend"]["QnnHtp"]
            self.bins = [str(name) for name in self.engine["model"]["binary"]["ctx-bins"]]
            self.tokenizer_path = str(self.dialog["tokenizer"]["path"])
        except (KeyError, TypeError):
            raise InputError(
                f"{folder / CONFIG} is not a configuration of a dialog on QnnHtp; see refimpl bundle"
            ) from None
        self.extensions = self.engine["backend"].get("extensions")
        self.config = self._config()
        self.tokenizer = self._json(self.tokenizer_path)
        self.tokenizer_config = self._json("tokenizer_config.json", needed=False)
        self.binaries = list(self._binaries(read))
        self.graphs = [graph for binary in self.binaries for graph in binary.graphs]

    def _config(self) -> Config | None:
        if not (self.folder / "config.json").is_file():
            return None
        try:
            return read_config(self.folder)
        except InputError as error:
            self.lost.append(Fault("config-unknown", "config.json", str(error), "copy the model's own config.json"))
            return None

    def _json(self, name: str, needed: bool = True) -> dict[str, Any]:
        if (self.folder / name).is_file():
            return read_json(self.folder / name)
        if needed:
            self.lost.append(_missing(name))
        return {}

    def _binaries(self, read: bool) -> Iterator[Binary]:
        for name in self.bins:
            if not (self.folder / name).is_file():
                self.lost.append(
                    Fault("file-missing", CONFIG, f"it names {name}, which is not there", f"put {name} there")
                )
                continue
            if not read:
                continue
            try:
                yield read_binary(self.folder / name)
            except InputError as error:
                self.lost.append(Fault("binary-damaged", name, str(error), "copy or compile it again"))

    def ends(self, name: str) -> Iterator[tuple[CompiledGraph, Tensor]]:
        """An input or output of that name, of each graph that has it."""
        for graph in self.graphs:
            for tensor in (*graph.inputs, *graph.outputs):
                if tensor.name == name:
                    yield graph, tensor


def _missing(name: str) -> Fault:
    return Fault("file-missing", CONFIG, f"it names {name}, which is not there", f"put {name} there")


def check_bundle(folder: str | Path, ask_genie: bool = True) -> BundleCheck:
    """Examines a bundle's folder. Without onnxruntime-qnn, its binaries are left out, and a remark says so.

    Raises InputError for a folder without a configuration of Genie.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected a bundle with {CONFIG}")
    remarks = []
    try:
        library("QnnSystem")
    except InputError as error:
        remarks.append(f"the binaries were not read, and Genie was not asked: {error}")
    bundle = _Bundle(folder, read=not remarks)
    faults = [*bundle.lost]
    for rule in (_of_config, _of_graphs, _of_cache, _of_mask, _of_tokenizer, _of_soc):
        faults += rule(bundle)
    if bundle.config is None and not any(fault.rule == "config-unknown" for fault in faults):
        remarks.append("the bundle has no config.json, so numbers of the model could not be held against it")
    if ask_genie and bundle.binaries and not bundle.lost:
        if any(len(binary.graphs) > 1 for binary in bundle.binaries):
            remarks.append("Genie was not asked: binaries that share their weights do not load on this machine")
        else:
            faults += _by_genie(folder)
    return BundleCheck(str(folder), tuple(faults), tuple(remarks))


STOPS = {"file-missing", "binary-damaged", "graph-twice", "part-missing", "soc"}  # with these, Genie cannot run


def expect_runs(folder: Path) -> tuple[Fault, ...]:
    """The faults of a bundle that Genie accepts silently. Raises InputError for one with which it cannot run here."""
    faults = check_bundle(folder, ask_genie=False).faults
    for fault in faults:
        if fault.rule in STOPS:
            raise InputError(f"{folder}: {fault.where}: {fault.why}; {fault.remedy} (refimpl bundle --check shows all)")
    return faults


def _by_genie(folder: Path) -> Iterator[Fault]:
    try:
        with Genie(folder):
            pass
    except InputError as error:
        yield Fault("refused", "Genie", str(error), "change what it names")


def _unequal(rule: str, key: str, found: Any, wanted: Any, of: str, effect: str) -> Iterator[Fault]:
    if found != wanted:
        yield Fault(rule, CONFIG, f"{key} is {found}, {of} has {wanted}; {effect}", f"set {key} to {wanted}")


def _of_config(bundle: _Bundle) -> Iterator[Fault]:
    """Genie's configuration against the model's."""
    config = bundle.config
    if config is None:
        return
    if config.alibi:
        why = f"{config.family} has ALiBi, a bias for each head, and Genie feeds one mask for all heads"
        yield Fault("alibi", "config.json", why, "run the graphs from a host of your own")
        return
    silent = "Genie takes it without a word"
    positions = bundle.engine["model"].get("positional-encoding", {})
    theta = positions.get("rope-theta", bundle.htp.get("rope-theta"))
    half, dim = config.head_dim // 2, positions.get("rope-dim", bundle.htp.get("pos-id-dim"))
    if theta is None or not math.isclose(float(theta), config.rope_theta or 0.0):
        exact = config.rope_theta or 0.0
        wanted = int(exact) if exact.is_integer() else exact
        yield from _unequal(
            "rope-theta", "rope-theta", theta, wanted, "config.json", f"{silent}, and positions are wrong"
        )
    yield from _unequal("pos-id-dim", "pos-id-dim", dim, half, "half a head of config.json", "Genie refuses it")
    yield from _unequal("kv-dim", "kv-dim", bundle.htp.get("kv-dim"), config.head_dim, "config.json", silent)
    yield from _unequal("n-vocab", "n-vocab", bundle.context.get("n-vocab"), config.vocab_size, "config.json", silent)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    given = bundle.context.get("eos-token")
    ends = set(given if isinstance(given, list) else [given])
    if known != [None] and not ends & set(known):
        yield Fault("eos", CONFIG, f"eos-token is {given}, config.json ends a text with {known}; it would never end",
                    f"set eos-token to {known[0]}")  # fmt: skip


def _of_graphs(bundle: _Bundle) -> Iterator[Fault]:
    """Configurations against the graphs in the binaries."""
    if not bundle.graphs:
        return
    contexts = {tensor.shape[-1] for _, tensor in bundle.ends("attention_mask")}
    size = bundle.context.get("size")
    if contexts and size != max(contexts):
        effect = "Genie refuses it" if size is None or size > max(contexts) else "what lies behind is never used"
        yield from _unequal("context-size", "context size", size, max(contexts), "the mask of the graphs", effect)
    for graph, tensor in bundle.ends("logits"):
        if tensor.shape[-1] != bundle.context.get("n-vocab"):
            why = f"n-vocab is {bundle.context.get('n-vocab')}, logits of {graph.called} have {tensor.shape[-1]} words"
            yield Fault(
                "n-vocab", CONFIG, f"{why}; Genie takes it without a word", f"set n-vocab to {tensor.shape[-1]}"
            )
            break
    names = Counter(graph.called for graph in bundle.graphs)
    if twice := [name for name, count in names.items() if count > 1]:
        yield Fault("graph-twice", twice[0], "two binaries have a graph of that name", "name each binary once")
    if not any(True for _ in bundle.ends("logits")):
        yield Fault("part-missing", CONFIG, "no graph of its binaries gives logits", "name the last part, too")
    layers = {int(found[2]) for graph in bundle.graphs for t in graph.inputs if (found := CACHE.fullmatch(t.name))}
    if bundle.config and layers != set(range(bundle.config.num_hidden_layers)):
        why = f"the graphs have {len(layers)} layers, config.json {bundle.config.num_hidden_layers}"
        yield Fault("part-missing", CONFIG, why, "name the binaries of all parts")


def _of_cache(bundle: _Bundle) -> Iterator[Fault]:
    """A cache comes in as it went out, in the same codes, and its heads have the size that the configuration says."""
    for graph in bundle.graphs:
        given = {tensor.name: tensor for tensor in graph.outputs}
        for tensor in graph.inputs:
            found = CACHE.fullmatch(tensor.name)
            if not found:
                continue
            dim = tensor.shape[2 if found[1] == "key" else 3] if len(tensor.shape) == 4 else None
            if dim != bundle.htp.get("kv-dim"):
                why = f"{tensor.name} has heads of {dim}, kv-dim is {bundle.htp.get('kv-dim')}"
                yield Fault("kv-dim", graph.called, f"{why}; Genie takes it without a word", f"set kv-dim to {dim}")
                return
            other = given.get(tensor.name.replace("_in", "_out"))
            if other and (tensor.scale, tensor.zero_point) != (other.scale, other.zero_point):
                why = f"{tensor.name} has scale {tensor.scale:.6g}, {other.name} {other.scale:.6g}; Genie refuses it"
                yield Fault("kv-untied", graph.called, why, "give both one grid, and compile again")
                return
            if tensor.scale is not None and tensor.zero_point != 128:
                why = f"{tensor.name} has the zero point {tensor.zero_point}, and empty slots of the cache hold 128"
                yield Fault("kv-zero-point", graph.called, why, "give keys and values the zero point 128")
                return


def _of_mask(bundle: _Bundle) -> Iterator[Fault]:
    """Genie writes the codes 0, which has to hide, and 65535, which has to be 0; cos and sin reach from -1 to 1."""
    for graph, tensor in bundle.ends("attention_mask"):
        if tensor.scale is None or tensor.zero_point is None:
            continue
        lowest, highest = -tensor.zero_point * tensor.scale, (65535 - tensor.zero_point) * tensor.scale
        if lowest > HIDES:
            why = f"the lowest value of attention_mask is {lowest:.4g}, and {HIDES:g} at least hides a token"
            yield Fault("mask-scale", graph.called, f"{why}; Genie takes it without a word",
                        "calibrate the mask from -50 to 0, and compile again")  # fmt: skip
            break
        if abs(highest) > tensor.scale:
            why = f"where a token looks Genie writes 65535, which is {highest:.4g} on the mask's grid, expected 0"
            yield Fault("mask-scale", graph.called, why, "give the mask the zero point 65535")
            break
    for name in ("position_ids_cos", "position_ids_sin"):
        for graph, tensor in bundle.ends(name):
            if tensor.scale is None or tensor.zero_point is None:
                continue
            low, high = -tensor.zero_point * tensor.scale, (65535 - tensor.zero_point) * tensor.scale
            if low > -0.999 or high < 0.999:
                why = f"{name} reaches from {low:.4g} to {high:.4g}, expected -1 to 1"
                yield Fault("rotary-scale", graph.called, why, "calibrate it from -1 to 1, and compile again")
                break


def _of_tokenizer(bundle: _Bundle) -> Iterator[Fault]:
    """The tokenizer's words, and the token that Genie puts before a prompt."""
    bos, vocabulary = bundle.context.get("bos-token"), _vocabulary(bundle.tokenizer)
    adds = bundle.tokenizer_config.get("add_bos_token")
    if adds is False and bos not in (-1, None):
        why = f"bos-token is {bos}, and tokenizer_config.json says add_bos_token false"
        yield Fault("bos", CONFIG, f"{why}; Genie puts it before every prompt", "set bos-token to -1")
    if adds is True and bos == -1:
        yield Fault("bos", CONFIG, "bos-token is -1, and tokenizer_config.json says add_bos_token true",
                    "set bos-token to the id that begins a text")  # fmt: skip
    if not vocabulary:
        return
    words = bundle.context.get("n-vocab")
    if type(words) is int and max(vocabulary.values()) >= words:
        why = f"it has ids up to {max(vocabulary.values())}, n-vocab is {words}"
        yield Fault("tokenizer", bundle.tokenizer_path, why, "copy the tokenizer.json of this model")
    known, given = set(vocabulary.values()), bundle.context.get("eos-token")
    for id in given if isinstance(given, list) else [given]:
        if id not in known:
            yield Fault("tokenizer", bundle.tokenizer_path, f"it has no token {id}, which is eos-token",
                        "copy the tokenizer.json of this model")  # fmt: skip
    official = {"Baichuan2-7B": {"<s>": 1, "</s>": 2}, "Baichuan-7B": {"<s>": 1, "</s>": 2}}
    family = bundle.config.family if bundle.config else ""
    for text, id in official.get(family, {}).items():
        if vocabulary.get(text) != id:
            why = f"{text} has the id {vocabulary.get(text)}, {family} has {id}"
            yield Fault("tokenizer", bundle.tokenizer_path, why, "copy the tokenizer.json of this model")


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Text -> id of a tokenizer.json; entries that are malformed are left out."""
    model = tokenizer.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    words = dict(found) if isinstance(found, dict) else {}
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            words[str(token.get("content"))] = token.get("id")
    return {text: id for text, id in words.items() if type(id) is int}


def _of_soc(bundle: _Bundle) -> Iterator[Fault]:
    """The NPU of the configuration: it is that of each binary, and its two numbers belong together."""
    stated = None
    if bundle.extensions:
        if not (bundle.folder / bundle.extensions).is_file():
            yield _missing(bundle.extensions)
            return
        devices = read_json(bundle.folder / bundle.extensions).get("devices")
        device = devices[0] if isinstance(devices, list) and devices and isinstance(devices[0], dict) else {}
        stated, architecture = device.get("soc_model"), device.get("dsp_arch")
        known = {soc.model: soc.architecture for soc in SOCS.values()}
        if stated in known and architecture != known[stated]:
            why = f"soc_model {stated} has the architecture {known[stated]}, dsp_arch is {architecture}"
            yield Fault("soc", bundle.extensions, why, f"set dsp_arch to {known[stated]}")
    for binary in bundle.binaries:
        if stated is not None and binary.soc_model not in (None, 0, stated):
            why = f"it is made for {binary.made_for}, {bundle.extensions} says soc_model {stated}"
            yield Fault("soc", binary.path.name, why, "compile it for that SoC, or change the configuration")
