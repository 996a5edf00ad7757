"""`bundle`: the folder that Genie runs a model from, but for the binaries that AI Hub compiles.

    genie_config.json             sizes and ids of the model, sampling, and the names of the binaries, part after part
    htp_backend_ext_config.json   the NPU, and that a part's graphs share their weights
    tokenizer.json, …_config.json, config.json
    metadata.yaml                 each graph's inputs and outputs: shape, dtype, scale and offset
    tool-versions.yaml            what wrote this
    sample_prompt.txt             a prompt as `genie-t2t-run -p` takes it

Keys and defaults are those of Qualcomm's own configuration of Baichuan2-7B. Genie computes rotary positions and a mask
with one head; a model with ALiBi needs a mask for each head, and nothing public says how Genie would be given one.

**Source**: AI Hub Apps 0.20, `tutorials/llm_on_genie/configs/genie`; AI Hub Models 0.46, `_shared/llm/model.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import refimpl
from export.files.graph_folder import CACHE, GraphFolder, read_folders
from export.files.skeleton import ValueInfo
from export.phone.tokenizer_json import tokenizer_json
from export.run.socs import soc_called
from refimpl.config import Config, read_config
from refimpl.errors import InputError, at_most
from refimpl.files import read_json, whole_folder

BASE_PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"  # from the model card of Baichuan2-7B-Base
QUESTION = "《静夜思》的作者是谁？"
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 10: "float16"}


def bundle(
    checkpoint: str | Path, graphs: str | Path, out: str | Path, bins: Sequence[str] = (), soc: str = "8-elite"
) -> Path:
    """Writes the bundle of a checkpoint whose exported graphs are in `graphs` to the new folder `out`.

    `bins` are the names of the binaries, part after part; by default those that AI Hub Models gives them. They are not
    read: put them beside the files when they are compiled.

    Raises InputError for a model that Genie cannot run, graphs that are not its graphs, and an `out` that is not free.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    soc_called(soc)
    config = read_config(checkpoint)
    if config.alibi:
        raise InputError(f"{config.family} has ALiBi, and Genie computes rotary positions only; "
                         "run its graphs from a host of your own, which adds the bias to the mask")  # fmt: skip
    parts = parts_of(config, Path(graphs))
    total, context = parts[0].called[4], max(part.called[2] for part in parts)  # type: ignore[index]
    stem = config.family.lower().replace("-", "_")
    names = [Path(name).name for name in bins] or [f"{stem}_part_{i + 1}_of_{total}.bin" for i in range(total)]
    if len(names) != total or len(set(names)) < total:
        raise InputError(f"there are {len(set(names))} different names of binaries for {total} parts; name each once")
    generation = _optional(checkpoint / "generation_config.json")
    tokenizer, settings, ids = tokenizer_files(checkpoint, config, generation)
    contents: dict[str, Any] = {
        "genie_config.json": genie_config(config, context, names, *ids),
        "htp_backend_ext_config.json": htp_config(soc),
        "tokenizer.json": tokenizer, "tokenizer_config.json": settings,
        "config.json": read_json(checkpoint / "config.json"),
        "metadata.yaml": as_yaml(described(parts)),
        "tool-versions.yaml": as_yaml({"refimpl": refimpl.__version__, "onnx": metadata.version("onnx")}),
        "sample_prompt.txt": sample_prompt(config, settings, generation, tokenizer),
    }  # fmt: skip
    write_folder(
        out, {name: content if isinstance(content, str) else _json(content) for name, content in contents.items()}
    )
    return out


def binaries(folder: str | Path) -> list[str]:
    """The names of the binaries that a bundle needs beside it."""
    return read_json(Path(folder) / "genie_config.json")["dialog"]["engine"]["model"]["binary"]["ctx-bins"]


def genie_config(config: Config, context: int, bins: Sequence[str], bos: int, eos: int) -> dict[str, Any]:
    """`genie_config.json`. `bos` is -1 for a model that begins a text with none."""
    theta = config.rope_theta or 0.0
    engine = {
        "version": 1,
        "n-threads": 3,
        "backend": {
            "version": 1,
            "type": "QnnHtp",
            "QnnHtp": {
                "version": 1, "use-mmap": True, "spill-fill-bufsize": 0, "mmap-budget": 0, "poll": False,
                "cpu-mask": "0xe0", "kv-dim": config.head_dim,
                "rope-theta": int(theta) if theta.is_integer() else theta,
                "pos-id-dim": config.head_dim // 2, "allow-async-init": False,
            },
            "extensions": "htp_backend_ext_config.json",
        },
        "model": {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": list(bins)}},
    }  # fmt: skip
    return {
        "dialog": {
            "version": 1,
            "type": "basic",
            "context": {
                "version": 1, "size": context, "n-vocab": config.vocab_size, "bos-token": bos, "eos-token": eos
            },
            "sampler": {"version": 1, "seed": 42, "temp": 0.8, "top-k": 40, "top-p": 0.95},
            "tokenizer": {"version": 1, "path": "tokenizer.json"},
            "engine": engine,
        }
    }  # fmt: skip


def htp_config(soc: str) -> dict[str, Any]:
    """`htp_backend_ext_config.json` for an SoC by its name."""
    chosen = soc_called(soc)
    core = {"core_id": 0, "perf_profile": "burst", "rpc_control_latency": 100}
    return {
        "devices": [{"soc_model": chosen.model, "dsp_arch": chosen.architecture, "cores": [core]}],
        "memory": {"mem_type": "shared_buffer"},
        "context": {"weight_sharing_enabled": True},
    }


def parts_of(config: Config, folder: Path) -> list[GraphFolder]:
    """The exported graphs of a model, part after part. Raises InputError if they are none of it, or not all."""
    parts = read_folders(folder)
    for part in parts:
        if part.damage:
            raise InputError(f"{part.folder}: {part.damage[0]}")
        if not part.called:
            raise InputError(
                f"{part.folder} is not called {{prompt|token}}_ar{{S}}_cl{{C}}_{{i}}_of_{{N}}; export again"
            )
    parts.sort(key=lambda part: (part.called[3], -part.called[1], part.called[2]))  # type: ignore[index]
    runs: dict[tuple[int, int], list[GraphFolder]] = {}
    for part in parts:
        runs.setdefault(part.called[1:3], []).append(part)  # type: ignore[index]
    totals = {part.called[4] for part in parts}  # type: ignore[index]
    for (tokens, context), run in runs.items():
        numbers = [part.called[3] for part in run]  # type: ignore[index]
        if len(totals) > 1 or numbers != list(range(1, max(totals) + 1)):
            raise InputError(
                f"{folder} has parts {at_most(numbers)} of {at_most(sorted(totals))} with {tokens} tokens at a time "
                f"and a context of {context}; export all of them in one go"
            )
        _check_run(config, folder, run)
    return parts


def _check_run(config: Config, folder: Path, run: list[GraphFolder]) -> None:
    """Raises InputError if parts are not those of the config: its layers, cache and vocabulary."""
    K, D = config.num_key_value_heads, config.head_dim
    layers = sorted({layer for part in run for layer, _ in part.cache(part.graph.inputs)})
    if layers != list(range(config.num_hidden_layers)):
        raise InputError(f"{folder} has {len(layers)} layers, the model {config.num_hidden_layers}; export this model")
    for part in run:
        for (_, kind), value in part.cache(part.graph.inputs).items():
            shape = value.shape or ()
            if len(shape) != 4 or (shape[0], shape[2 if kind == "key" else 3]) != (K, D):
                raise InputError(
                    f"{value.name} of {part.name} has the shape {shape}, the model {K} heads of {D}; export this model"
                )
    logits = next((value for value in run[-1].graph.outputs if value.name == "logits"), None)
    if not logits or not logits.shape or logits.shape[-1] != config.vocab_size:
        said = f"logits of shape {logits.shape}" if logits else "no logits"
        raise InputError(f"{run[-1].name} gives {said}, the model has {config.vocab_size} words; export this model")


def tokenizer_files(
    checkpoint: Path, config: Config, generation: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int]]:
    """`tokenizer.json`, `tokenizer_config.json`, and the ids that begin (-1: none) and end a text.

    Baichuan's are made from `tokenizer.model`; Qwen2's are there. Raises InputError if they are missing, or another's.
    """
    if config.family == "Qwen2-7B":
        made, settings = (read_json(checkpoint / f"tokenizer{kind}.json") for kind in ("", "_config"))
        added = made.get("added_tokens")
        entries = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        known = {str(token.get("content")): token.get("id") for token in entries}
        begin, end = (known.get(_text_of(settings.get(key))) for key in ("bos_token", "eos_token"))
        if type(end) is not int or not 0 <= end < config.vocab_size:
            raise InputError(
                f"{checkpoint}/tokenizer_config.json names no eos_token of tokenizer.json; copy both again"
            )
        return made, settings, (begin if type(begin) is int else -1, end)
    path = checkpoint / "tokenizer.model"
    made = tokenizer_json(path)
    vocabulary = made["model"]["vocab"]
    if len(vocabulary) != config.vocab_size or not {"<s>", "</s>", "<unk>"} <= set(vocabulary):
        raise InputError(
            f"{path} has {len(vocabulary)} pieces, the model {config.vocab_size}; copy the file of this model"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }  # fmt: skip
    if said := roles(made, generation):
        settings["chat_template"] = _template(config, *said)
    return made, settings, (vocabulary["<s>"], vocabulary["</s>"])


def roles(tokenizer: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[str, str] | None:
    """The texts that become a Baichuan chat model's role ids, or None for a model that generation_config gives none.

    Raises InputError for ids that no text such as <reserved_106> becomes.
    """
    ids = [generation.get(key) for key in ("user_token_id", "assistant_token_id")]
    if ids == [None, None]:
        return None
    whole = {token["id"]: token["content"] for token in tokenizer["added_tokens"] if not token["special"]}
    if not all(type(id) is int and re.fullmatch(r"<\w{1,40}>", whole.get(id, "")) for id in ids):
        raise InputError(
            f"generation_config.json gives the roles the ids {ids!r:.60}, expected those of pieces such as "
            "<reserved_106>; mend it"
        )
    return whole[ids[0]], whole[ids[1]]


def _template(config: Config, user: str, assistant: str) -> str:
    """The layouts of `refimpl.text.chat` in Jinja, for conversations that fit: a template cannot cut."""
    first = config.family.startswith("Baichuan2")
    system = "{{ message['content'] }}" if first else "{{ raise_exception('Baichuan 1 has no role system') }}"
    end = "" if first else " + '</s>'"
    last = "{% if messages[-1]['role'] != 'assistant' %}" if first else "{% if true %}"
    return (
        "{% for message in messages %}{% if message['role'] == 'system' %}" + system
        + "{% elif message['role'] == 'user' %}{{ '" + user + "' + message['content'] }}"
        + "{% else %}{{ '" + assistant + "' + message['content']" + end + " }}{% endif %}{% endfor %}"
        + last + "{{ '" + assistant + "' }}{% endif %}"
    )  # fmt: skip


def sample_prompt(
    config: Config, settings: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> str:
    """A prompt in the model's own layout, roles written out: their texts become their ids. Base models continue."""
    if config.family == "Qwen2-7B":
        if "chat_template" not in settings:
            return BASE_PROMPT
        said = [("system", "You are a helpful assistant."), ("user", QUESTION)]
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said) + "<|im_start|>assistant\n"
    if said_by := roles(tokenizer, generation):
        return f"{said_by[0]}{QUESTION}{said_by[1]}"
    return BASE_PROMPT


def described(parts: Sequence[GraphFolder]) -> dict[str, Any]:
    """What `metadata.yaml` says: real = (code + offset) * scale."""
    components = {
        part.name: {
            "inputs": {value.name: _described(part, value) for value in part.graph.inputs},
            "outputs": {value.name: _described(part, value) for value in part.graph.outputs},
        }
        for part in parts
    }
    return {"precision": _precision(parts), "runtime": "genie", "components": components}


def _described(part: GraphFolder, value: ValueInfo) -> dict[str, Any]:
    grid, dtype = part.standing.get(value.name), DTYPES.get(value.dtype, str(value.dtype))
    said: dict[str, Any] = {"shape": list(value.shape or ()), "dtype": dtype}
    if grid is not None and dtype == "float32":
        said["dtype"] = f"float{grid.bits}" if grid.floating else "uint8" if grid.bits <= 8 else "uint16"
        if grid.scale is not None:
            said["quantization_parameters"] = {"scale": grid.scale, "offset": grid.offset}
    return said


def _precision(parts: Sequence[GraphFolder]) -> str:
    """Bits of most weights and of most activations, such as w4a16."""
    weights: dict[int, int] = {}
    activations: dict[int, int] = {}
    for part in parts:
        for tensor in part.constants.values():
            grid = (part.grids or {}).get(tensor.name)
            if grid and len(tensor.dims) > 1:
                weights[grid.bits] = weights.get(grid.bits, 0) + math.prod(tensor.dims)
        for value in part.ends:
            if (grid := part.standing.get(value.name)) and not CACHE.fullmatch(value.name):
                activations[grid.bits] = activations.get(grid.bits, 0) + 1
    if not weights or not activations:
        return "float"
    return f"w{max(weights, key=weights.__getitem__)}a{max(activations, key=activations.__getitem__)}"


def as_yaml(content: Mapping[str, Any], indent: int = 0) -> str:
    """A mapping of mappings, lists of numbers, numbers and texts as YAML, which every reader takes alike."""
    lines = []
    for key, value in content.items():
        start = f"{'  ' * indent}{_scalar(key)}:"
        if isinstance(value, Mapping):
            lines.append(f"{start}\n{as_yaml(value, indent + 1)}" if value else f"{start} {{}}\n")
        elif isinstance(value, list):
            lines.append(f"{start} [{', '.join(map(_scalar, value))}]\n")
        else:
            lines.append(f"{start} {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, float):  # YAML 1.1 takes 1e-05 for a text
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    words = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # which are no texts in YAML
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", value) and value.lower() not in words
    return value if plain else json.dumps(value)


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Writes files into a new folder, all or none. Raises InputError if the folder is not free or cannot be written."""
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; choose another place")
    with whole_folder(folder) as partial:
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text_of(token: Any) -> str:
    """A token's text, which tokenizer_config.json says as it is or in an object."""
    return str(token.get("content") if isinstance(token, dict) else token)
