"""`bundle`: the folder that Genie runs a model from, with the binaries or without.

    genie_config.json             sizes and ids of the model, sampling, and the names of the binaries, part after part
    text-generator.json           the same for a pipeline of genie-app, and genie-app-script.txt, which runs one
    htp_backend_ext_config.json   the NPU, and that a part's graphs share their weights
    tokenizer.json, …_config.json, config.json
    metadata.json, metadata.yaml  each graph's inputs and outputs: shape, dtype and grid; for GenieX and for older tools
    tool-versions.yaml            what wrote this
    sample_prompt.txt             a prompt as `genie-t2t-run -p` takes it
    *.bin                         the binaries of `refimpl compile`, if they are given

A model with ALiBi is refused. Its graphs add a bias of their own for each head to the scores, through the mask, and
Genie feeds one mask for all heads. Genie does know a positional encoding `alibi`, which feeds `position_ids`; its
columns were measured to be in another order than mask and cache, so graphs made for it give other numbers.

**Source**: AI Hub Models 0.65, `models/templates/llm`; AI Hub Apps 0.20, `tutorials/llm_on_genie/configs/genie`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import refimpl
from export.files.graph_folder import GraphFolder, read_parts
from export.phone.compiler import Compiled, read_compiled
from export.phone.metadata import as_metadata, as_yaml, described
from export.phone.settings import genie_config, htp_config
from export.phone.tokenizer_json import tokenizer_json
from export.run.socs import soc_called
from refimpl.config import Config, read_config
from refimpl.errors import InputError, at_most
from refimpl.files import read_json, whole_folder

BASE_PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"  # from the model card of Baichuan2-7B-Base
QUESTION = "《静夜思》的作者是谁？"
SYSTEM = "You are a helpful assistant."
APP_SCRIPT = """version
pipeline config create pipelineConfig
pipeline create GeniePipeline pipelineConfig
node config create textGeneratorConfig text-generator.json
node create textGenerator textGeneratorConfig
node set textCallback textGenerator GENIE_NODE_TEXT_GENERATOR_TEXT_OUTPUT
pipeline add GeniePipeline textGenerator
node set textFile textGenerator GENIE_NODE_TEXT_GENERATOR_TEXT_INPUT sample_prompt.txt
pipeline execute GeniePipeline
node free textGenerator
pipeline free GeniePipeline
"""


def bundle(
    checkpoint: str | Path,
    graphs: str | Path,
    out: str | Path,
    bins: Sequence[str] = (),
    soc: str = "8-elite",
    compiled: str | Path | None = None,
) -> Path:
    """Writes the bundle of a checkpoint whose exported graphs are in `graphs` to the new folder `out`.

    `compiled`: a folder of `refimpl compile`, whose binaries become part of the bundle. Without it `bins` are the names
    of the binaries, part after part; by default those that AI Hub Models gives them. They are not read: put them beside
    the files when they are compiled.

    Raises InputError for a model that Genie cannot run, graphs that are not its graphs, binaries of another SoC or of
    other graphs, and an `out` that is not free.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    soc_called(soc)
    config = read_config(checkpoint)
    expect_no_alibi(config)
    parts = parts_of(config, Path(graphs))
    context = max(graph.part.context for graph in parts)
    names = _compiled_names(parts, read_compiled(compiled), soc) if compiled else _names(config, parts, bins)
    generation = _optional(checkpoint / "generation_config.json")
    tokenizer, settings, ids = tokenizer_files(checkpoint, config, generation)
    versions = {"refimpl": refimpl.__version__, "onnx": metadata.version("onnx")}
    genie = genie_config(config, context, names, *ids)
    chat = chat_texts(config, settings, generation, tokenizer)
    contents: dict[str, Any] = {
        "genie_config.json": genie,
        "text-generator.json": {"text-generator": genie["dialog"]},
        "genie-app-script.txt": APP_SCRIPT,
        "htp_backend_ext_config.json": htp_config(soc),
        "tokenizer.json": tokenizer, "tokenizer_config.json": settings,
        "config.json": read_json(checkpoint / "config.json"),
        "metadata.json": as_metadata(parts, config.family, chat, {"onnx": versions["onnx"]}),
        "metadata.yaml": as_yaml(described(parts)),
        "tool-versions.yaml": as_yaml(versions),
        "sample_prompt.txt": sample_prompt(config, settings, generation, tokenizer),
    }  # fmt: skip
    write_folder(
        out,
        {name: content if isinstance(content, str) else _json(content) for name, content in contents.items()},
        [Path(compiled) / name for name in names] if compiled else [],
    )
    return out


def expect_no_alibi(config: Config) -> None:
    """Raises InputError for a model that Genie cannot feed."""
    if config.alibi:
        raise InputError(
            f"{config.family} has ALiBi, a bias for each head, and Genie feeds one mask for all heads; its own ALiBi "
            "input does not fit these graphs, so run them from a host of your own, which adds the bias to the mask"
        )


def _names(config: Config, parts: Sequence[GraphFolder], bins: Sequence[str]) -> list[str]:
    """The names of binaries that are not there yet."""
    total, stem = parts[0].part.total, config.family.lower().replace("-", "_")
    names = [Path(name).name for name in bins] or [f"{stem}_part_{i + 1}_of_{total}.bin" for i in range(total)]
    if len(names) != total or len(set(names)) < total:
        raise InputError(f"there are {len(set(names))} different names of binaries for {total} parts; name each once")
    return names


def _compiled_names(parts: Sequence[GraphFolder], compiled: Compiled, soc: str) -> list[str]:
    """The compiled binaries in Genie's order: part after part, those of prompts before those of single tokens."""
    if compiled.soc != soc:
        raise InputError(f"{compiled.folder} has binaries for {compiled.soc}, not for {soc}; compile for that")
    known, there = {part.name for part in parts}, {name for names in compiled.binaries.values() for name in names}
    if known != there:
        raise InputError(
            f"{compiled.folder} has binaries of {at_most(sorted(there))}, the export has {at_most(sorted(known))}; "
            "compile this export"
        )
    order = {graph.name: (-graph.part.tokens, graph.part.number) for graph in parts}
    return sorted(compiled.binaries, key=lambda name: min(order[graph] for graph in compiled.binaries[name]))


def binaries(folder: str | Path) -> list[str]:
    """The names of the binaries that a bundle needs beside it."""
    return read_json(Path(folder) / "genie_config.json")["dialog"]["engine"]["model"]["binary"]["ctx-bins"]


def parts_of(config: Config, folder: Path) -> list[GraphFolder]:
    """The exported graphs of a model, part after part. Raises InputError if they are another's, or incomplete."""
    graphs = read_parts(folder)
    graphs.sort(key=lambda graph: (graph.part.number, -graph.part.tokens, graph.part.context))
    runs: dict[tuple[int, int], list[GraphFolder]] = {}
    for graph in graphs:
        runs.setdefault((graph.part.tokens, graph.part.context), []).append(graph)
    totals = {graph.part.total for graph in graphs}
    for (tokens, context), run in runs.items():
        numbers = [graph.part.number for graph in run]
        if len(totals) > 1 or numbers != list(range(1, max(totals) + 1)):
            raise InputError(
                f"{folder} has parts {at_most(numbers)} of {at_most(sorted(totals))} with {tokens} tokens at a time "
                f"and a context of {context}; export all of them in one go"
            )
        _check_run(config, folder, run)
    return graphs


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

    Baichuan's are made from `tokenizer.model`; Qwen2's are read. Raises InputError if they are missing, or another's.
    """
    if config.family == "Qwen2-7B":
        made, settings = (read_json(checkpoint / f"tokenizer{kind}.json") for kind in ("", "_config"))
        added = made.get("added_tokens")
        entries = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        known = {str(token.get("content")): token.get("id") for token in entries}
        begin, end = (known.get(_text_of(settings.get(key))) for key in ("bos_token", "eos_token"))
        begin = begin if settings.get("add_bos_token") is True else None  # Genie puts it before every prompt
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
    return made, settings, (-1, vocabulary["</s>"])  # the official tokenizers add no <s>; Genie would, given its id


def roles(tokenizer: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[str, str] | None:
    """The texts that become a Baichuan chat model's role ids; None if its generation_config has no role ids.

    Raises InputError for ids that are not those of a text such as <reserved_106>.
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
    """A prompt in the model's own layout. Roles are texts that become their ids; base models get a text to continue."""
    if config.family == "Qwen2-7B":
        if "chat_template" not in settings:
            return BASE_PROMPT
        said = [("system", SYSTEM), ("user", QUESTION)]
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said) + "<|im_start|>assistant\n"
    if said_by := roles(tokenizer, generation):
        return f"{said_by[0]}{QUESTION}{said_by[1]}"
    return BASE_PROMPT


def chat_texts(
    config: Config, settings: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> dict[str, str]:
    """The texts that `metadata.json` puts around the words of each role; {} for a model that only continues a text."""
    if config.family == "Qwen2-7B" and "chat_template" in settings:
        around = {f"{role}_prefix": f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
        ends = {f"{role}_suffix": "<|im_end|>\n" for role in ("system", "user", "assistant")}
        return {**around, **ends, "default_system_prompt": SYSTEM}
    if config.family != "Qwen2-7B" and (said := roles(tokenizer, generation)):
        return {"user_prefix": said[0], "assistant_prefix": said[1]}
    return {}


def write_folder(folder: Path, files: Mapping[str, str], copied: Sequence[Path] = ()) -> None:
    """Writes files into a new folder, and copies others, all or none.

    Raises InputError if the folder is not free or cannot be written.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; choose another place")
    with whole_folder(folder) as partial:
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in copied:
            shutil.copyfile(path, partial / path.name)


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text_of(token: Any) -> str:
    """A token's text, which tokenizer_config.json has as a text or in an object."""
    return str(token.get("content") if isinstance(token, dict) else token)
