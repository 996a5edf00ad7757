"""Goldens from PyTorch: run a model there, record every tensor of the tap table, and store it with its origin.

There are two implementations to run, and neither is ours:

- "transformers": a class of transformers with the same arithmetic. Qwen2 has a class of its own. A RoPE Baichuan is a
  Llama whose q, k and v come from W_pack; for NormHead (Baichuan2), the rows of lm_head are scaled to length 1. No
  class fits the ALiBi Baichuans: BLOOM, MPT and Falcon have LayerNorm and GELU.
- "remote": the modeling code beside config.json, which `auto_map` names there. It is executed, so you must trust it;
  its files and their sha256 are printed first. Nothing is downloaded.

Hooks show what goes into and comes out of each module. A mode that sees every call of a torch function shows what is
multiplied inside attention (`Watch`). Both kinds are "observed". Three are "derived" from observed tensors: W_pack of a
model that has none, the scores before the mask, and the probabilities of a fused attention.

float64 means float64 throughout. Model code asks for float32 in places (the variance in RMSNorm, RoPE's tables,
softmax); a mode turns that into float64 while the model is built and run (`Float64`).
"""

from __future__ import annotations

import fnmatch
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from golden.bundle import Case, Golden, expect_name, expect_new, read, sha256, write
from golden.tolerance import largest_scores, tolerances
from refimpl.checkpoint.weights import Weights
from refimpl.config import Config, read_config
from refimpl.errors import InputError, at_most
from refimpl.files import read_json
from refimpl.model import Model
from refimpl.names import taps as tap_table
from refimpl.trace import Trace


class MissingTorchError(InputError, ImportError):
    """PyTorch or transformers is not installed."""


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a golden is made of what is in the folder
try:
    import torch
    import transformers
    from torch.nn.functional import normalize, scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode
    from transformers.initialization import no_init_weights
except ImportError as missing:
    raise MissingTorchError(f"goldens are made by PyTorch ({missing}): pip install 'refimpl[torch]'") from None

DTYPES = ("float64", "float32", "bfloat16", "float16")
_FITTING = {"Qwen2-7B": "Qwen2ForCausalLM", "Baichuan-7B": "LlamaForCausalLM", "Baichuan2-7B": "LlamaForCausalLM"}


def make(
    folder: str | Path,
    out: str | Path,
    prompts: Sequence[Any] | Mapping[str, Any],
    dtypes: Sequence[str] = ("float32", "float64"),
    trust_remote_code: bool = False,
    implementation: str = "auto",
    seed: int = 0,
    taps: str | None = None,
) -> Golden:
    """Runs the model in `folder` in PyTorch on each prompt in each number format, and stores the tensors in `out`.

    - `out`: a new folder
    - `prompts`: texts, lists of token ids, arrays (T,) or (B, T), or Cases with an attention mask. They are called p0,
      p1, … or by the keys of a mapping.
    - `implementation`: "transformers", "remote", or "auto" for the first of these that fits
    - `taps`: a glob; only tensors whose name matches are kept

    The same input gives the same bytes: one thread, deterministic algorithms.

    Raises InputError for a missing file, a model that does not fit, or code that is not trusted.
    """
    folder, out = Path(folder), Path(out)
    expect_new(out)
    config = read_config(folder)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    cases = {expect_name(name): _case(prompt, folder, config) for name, prompt in _named(prompts).items()}
    source = _source(folder, config, implementation, trust_remote_code)
    parameters, files = _checkpoint(folder)

    traces = {}
    with tqdm(total=len(cases) * len(dtypes), desc="PyTorch", disable=None, leave=False) as progress:
        for dtype in dtypes:
            with _deterministic(seed), _precision(dtype):
                model = _build(source, config, parameters, dtype)
                for name, case in cases.items():
                    traces[name, dtype] = _record(model, config, case, dtype, taps)
                    _expect_finite(traces[name, dtype], case, f"{name} in {dtype}")
                    progress.update()
            del model
    longest = max(case.ids.shape[1] for case in cases.values())
    scores = largest_scores(*traces.values())
    rules = {dtype: tolerances(config, dtype, longest, scores=scores) for dtype in dtypes}
    write(out, config, cases, traces, _provenance(folder, source, files, seed), rules)
    return read(out)


def _expect_finite(trace: Trace, case: Case, which: str) -> None:
    """Raises InputError if a logit is NaN or infinite, unless it belongs to padding."""
    logits = trace.get("lm_head")
    seen = np.ones(case.ids.shape, bool) if case.attention_mask is None else case.attention_mask.astype(bool)
    if logits is not None and not np.isfinite(logits[seen].astype(np.float64)).all():
        raise InputError(f"the logits of {which} are NaN or infinite, so nothing can be judged by them; leave that "
                         "format out, or mend the model")  # fmt: skip


def _provenance(folder: Path, source: _Source, files: Sequence[Path], seed: int) -> dict[str, Any]:
    """Where a golden comes from: code, versions, seed, and the sha256 of everything that was read."""
    return {
        "implementation": source.name,
        "code": source.files,
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seed": seed,
        "weights": {path.name: sha256(path) for path in files},
        "tokenizer": {path.name: sha256(path) for path in _tokenizer_files(folder)},
        "config": sha256(folder / "config.json"),
        "notes": source.notes,
    }  # fmt: skip


# Prompts and parameters ----------------------------------------------------------------------------------------------


def _named(prompts: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    named = dict(prompts) if isinstance(prompts, Mapping) else {f"p{k}": prompt for k, prompt in enumerate(prompts)}
    if not named:
        raise InputError("there is no prompt; expected at least one text or list of token ids")
    return named


def _case(prompt: Any, folder: Path, config: Config) -> Case:
    """The Case of a prompt, with the checks that the model would make."""
    model = Model(config, Weights({}), folder)  # only for its checks and its tokenizer
    given = prompt if isinstance(prompt, Case) else Case(prompt, text=prompt if isinstance(prompt, str) else None)
    ids, mask = model.token_ids(given.ids), given.attention_mask
    if ids.shape[1] > config.max_position_embeddings:
        raise InputError(f"{ids.shape[1]} tokens exceed the context of {config.max_position_embeddings}; use fewer")
    if mask is not None and (np.shape(mask) != ids.shape or np.asarray(mask).dtype.kind not in "iub"):
        raise InputError(f"attention_mask has shape {np.shape(mask)}, expected whole numbers of shape {ids.shape}")
    return Case(ids, None if mask is None else np.asarray(mask, np.int64), given.text)


def _tokenizer_files(folder: Path) -> list[Path]:
    return [path for name in ("tokenizer.model", "tokenizer.json") if (path := folder / name).is_file()]


def _checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """All tensors of the folder, mapped from disk, and the files that hold them. Nothing in a .bin is executed."""
    from safetensors.torch import load_file

    def load_bin(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    for whole, load in (("model.safetensors", load_file), ("pytorch_model.bin", load_bin)):
        index = folder / f"{whole}.index.json"
        names = [whole]
        if not (folder / whole).is_file():
            if not index.is_file():
                continue
            places = read_json(index).get("weight_map")
            names = sorted(set(places.values())) if isinstance(places, dict) else []
            if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise InputError(f"{index} has no weight_map that names files beside it; download it again")
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            try:
                tensors |= load(folder / name)
            except Exception as error:  # each format has its own ways to be broken
                raise InputError(f"cannot read {folder / name}: {_first_line(error)}; download it again") from None
        for name, x in tensors.items():
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise InputError(f"{name} of {folder} holds NaN or infinity, so no golden can be made of it; take "
                                 "weights that are whole")  # fmt: skip
        return tensors, [folder / name for name in names]
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin; expected weights")


# Implementations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """An implementation: its `name`, how to `build` the empty model, how to `convert` a checkpoint's parameters."""

    name: str
    build: Callable[[torch.dtype], torch.nn.Module]
    convert: Callable[[Config, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _source(folder: Path, config: Config, implementation: str, trusted: bool) -> _Source:
    if implementation not in ("auto", "transformers", "remote"):
        raise InputError(f"implementation is {implementation!r}, expected auto, transformers or remote")
    if implementation == "remote" or (implementation == "auto" and config.family not in _FITTING):
        return _remote(folder, config, trusted)
    if config.family not in _FITTING:
        raise InputError(
            f"no class of transformers computes {config.family} (ALiBi with RMSNorm and SwiGLU); use its own code: "
            "implementation remote, with trust_remote_code"
        )
    return _of_transformers(config)


def _of_transformers(config: Config) -> _Source:
    """The class of transformers with the same arithmetic."""
    name, packed = _FITTING[config.family], config.qkv_packed
    sizes: dict[str, Any] = dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=False,
        max_position_embeddings=config.max_position_embeddings, hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip

    def build(dtype: torch.dtype) -> torch.nn.Module:
        keys = (transformers.LlamaConfig if packed else transformers.Qwen2Config)(**sizes)
        # eager, because a fused attention does not show its probabilities
        return getattr(transformers, name)._from_config(keys, dtype=dtype, attn_implementation="eager")

    notes = ["W_pack cut into q_proj, k_proj and v_proj"] if packed else []
    notes += ["rows of lm_head divided by their length, in the number format of the run"] if config.norm_head else []
    if config.fused_attention:
        notes.append("in 16 bits this class rounds RoPE and attention at other places than the official code")
    return _Source(f"transformers {name}", build, _as_llama if packed else _plain, notes=notes)


def _plain(config: Config, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters without saved buffers, and with a head where it is tied to the embedding."""
    kept = {name: x for name, x in parameters.items() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        kept["lm_head.weight"] = kept["model.embed_tokens.weight"]
    return kept


def _as_llama(config: Config, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Baichuan's parameters under Llama's names."""
    found = {}
    for name, x in _plain(config, parameters).items():
        if name.endswith(".W_pack.weight"):
            for module, piece in zip(("q_proj", "k_proj", "v_proj"), x.chunk(3), strict=True):
                found[name.replace("W_pack", module)] = piece
        else:
            found[name] = normalize(x) if name == "lm_head.weight" and config.norm_head else x
    return found


def _remote(folder: Path, config: Config, trusted: bool) -> _Source:
    """The folder's own code. Raises InputError that says what would be executed, unless the code is trusted."""
    from transformers.dynamic_module_utils import get_relative_import_files

    auto_map = read_json(folder / "config.json").get("auto_map")
    references = auto_map if isinstance(auto_map, dict) else {}
    modules = []
    for key in ("AutoConfig", "AutoModelForCausalLM"):
        reference = references.get(key)
        if not isinstance(reference, str) or not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", reference):
            raise InputError(
                f"auto_map of {folder / 'config.json'} has {reference!r:.60} for {key}, expected module.Class of a "
                f"file beside it; a golden of {config.family} needs the model's own code"
            )
        modules.append(folder / f"{reference.split('.')[0]}.py")
    for path in modules:
        if not path.is_file():
            raise InputError(f"{path} is not there, but auto_map of config.json names it; download the model's code")
    paths = dict.fromkeys(modules + [Path(found) for path in modules for found in get_relative_import_files(path)])
    files = {path.name: sha256(path) for path in paths}
    said = ", ".join(f"{name} (sha256 {digest})" for name, digest in files.items())
    if not trusted:
        raise InputError(f"this would execute code from {folder}: {said}; read it, and if you trust it say so with "
                         "--trust-remote-code (trust_remote_code=True)")  # fmt: skip
    print(f"executing code from {folder}: {said}", file=sys.stderr)

    def build(dtype: torch.dtype) -> torch.nn.Module:
        options: dict[str, Any] = {"trust_remote_code": True}
        keys = transformers.AutoConfig.from_pretrained(folder.absolute(), local_files_only=True, **options)
        return transformers.AutoModelForCausalLM.from_config(keys, dtype=dtype, **options)

    return _Source(f"remote {references['AutoModelForCausalLM']}", build, _plain, files)


def _build(source: _Source, config: Config, parameters: dict[str, torch.Tensor], dtype: str) -> torch.nn.Module:
    """The model, ready to run: its parameters in `dtype`, its buffers made by its own code."""
    number = getattr(torch, dtype)
    ready = source.convert(config, {name: x.to(number) for name, x in parameters.items()})
    try:
        with no_init_weights():
            model = source.build(number)
        model.load_state_dict(ready, strict=True, assign=True)
    except Exception as error:
        raise InputError(f"{source.name} cannot be built with transformers {transformers.__version__}: "
                         f"{_first_line(error)}") from error  # fmt: skip
    return model.eval().requires_grad_(False)


# Number formats and determinism --------------------------------------------------------------------------------------


class Float64(TorchFunctionMode):
    """Turns float32 into float64 wherever code asks for it: `x.float()`, `x.to(torch.float32)`, `dtype=…`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = {key: self.widen(value) for key, value in (kwargs or {}).items()}
        return func(*map(self.widen, args), **wide)

    @staticmethod
    def widen(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value


@contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """For float64, the mode above, with float64 as the default of new tensors."""
    if dtype != "float64":
        yield
        return
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(was)


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """One thread, so that sums have one order, and one seed, in case there are random numbers."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


# Recording -----------------------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Sees what the attention of each layer multiplies: (query, transposed key), then (probabilities, value).

    `products`: layer -> the operands of each product of two (B, H, ·, ·) tensors; `fused`: layer -> the arguments of
    its scaled_dot_product_attention. `layer`: the layer whose attention is running, or None.
    """

    PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)

    def __init__(self) -> None:
        super().__init__()
        self.layer: int | None = None
        self.products: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.fused: dict[int, tuple[tuple, dict]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.layer is not None:
            if func in self.PRODUCTS and len(args) == 2 and args[0].ndim == args[1].ndim == 4:
                self.products.setdefault(self.layer, []).append(args)
            elif func is scaled_dot_product_attention:
                self.fused[self.layer] = (args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _record(model: torch.nn.Module, config: Config, case: Case, dtype: str, pattern: str | None) -> Trace:
    """Runs the model on a case; gives the trace of what was seen, in the table's order, with `origin` in its meta."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, x: torch.Tensor) -> None:
        seen[name] = x.detach().clone()  # a copy, since the model may go on to change the tensor in place

    watch = Watch()
    with observing(model, config, note, watch):
        run(model, config, case)
    return _trace(config, seen, watch, dtype, pattern)


@contextmanager
def observing(
    model: torch.nn.Module, config: Config, note: Callable[[str, torch.Tensor], None], watch: Watch
) -> Iterator[None]:
    """Until it ends, `note(name, tensor)` gets each tensor of the tap table that goes into or out of a module, and
    `watch` sees what is multiplied in attention."""
    modules, handles = dict(model.named_modules()), []

    def first(values: Any) -> torch.Tensor:
        return values[0] if isinstance(values, tuple) else values

    def at_output(name: str, module: torch.nn.Module) -> None:
        handles.append(module.register_forward_hook(lambda _module, _inputs, output: note(name, first(output))))

    def at_input(name: str, module: torch.nn.Module) -> None:
        def before(_module: torch.nn.Module, inputs: tuple, named: dict) -> None:
            note(name, first(inputs or tuple(named.values())))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def at_attention(layer: int, module: torch.nn.Module) -> None:
        handles.append(module.register_forward_pre_hook(lambda *_: setattr(watch, "layer", layer)))
        handles.append(module.register_forward_hook(lambda *_: setattr(watch, "layer", None)))

    for name, tap in tap_table(config).items():
        layer = _layer(name)
        if tap.observed == "output":
            for shown in [name] if name in modules else _pieces(name):
                if shown in modules:
                    at_output(shown, modules[shown])
        elif tap.observed:
            if (source := tap.observed.removeprefix("input ").format(i=layer)) in modules:
                at_input(name, modules[source])
        elif name.endswith(".query") and (attention := name.removesuffix(".query")) in modules:
            at_attention(layer, modules[attention])
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: torch.nn.Module, config: Config, case: Case, call: Callable[..., Any] | None = None) -> Any:
    """The output of the model for a case, or of `call` in its place. Raises InputError if the model's code fails."""
    options: dict[str, Any] = {"use_cache": False}
    if case.attention_mask is not None:
        options["attention_mask"] = torch.from_numpy(case.attention_mask)
        if config.rope_theta is not None:  # as generate() has it: padding takes no position
            options["position_ids"] = (options["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    try:
        return (call or model)(torch.from_numpy(case.ids), **options)
    except Exception as error:
        raise InputError(f"{type(model).__name__} failed under transformers {transformers.__version__}: "
                         f"{_first_line(error)}") from error  # fmt: skip


def _trace(config: Config, seen: Mapping, watch: Watch, dtype: str, pattern: str | None) -> Trace:
    """The trace of all taps that were seen, or that follow from what was seen."""
    everything: dict[str, tuple[torch.Tensor, str]] = {name: (x, "observed") for name, x in seen.items()}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}.self_attn"
        everything |= {f"{at}.{what}": found for what, found in _attention(config, watch, layer).items()}
        pieces = _pieces(f"{at}.W_pack")
        if f"{at}.W_pack" not in seen and all(piece in seen for piece in pieces):
            joined = torch.cat([seen[piece] for piece in pieces], dim=-1)
            everything[f"{at}.W_pack"] = joined, "derived: q_proj, k_proj and v_proj side by side"
    names = [name for name in tap_table(config) if name in everything]
    if pattern is not None:
        names = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            known = at_most(list(tap_table(config)), 3)
            raise InputError(f"no tensor that was seen is called {pattern!r}; names are such as {known}")
    meta = {"engine": "pytorch", "dtype": dtype, "origin": {name: everything[name][1] for name in names}}
    return Trace(((name, _numpy(everything[name][0])) for name in names), meta)


def _attention(config: Config, watch: Watch, layer: int) -> dict[str, tuple[torch.Tensor, str]]:
    """The local variables of a layer's attention that its products show."""
    per_key = config.num_attention_heads // config.num_key_value_heads

    def once(x: torch.Tensor) -> torch.Tensor:
        """Each key or value head once; some models repeat them for their query heads before they multiply."""
        return x[:, ::per_key] if x.shape[1] == config.num_attention_heads else x

    def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query @ once(key).repeat_interleave(per_key, dim=1).mT * config.head_dim**-0.5

    if layer in watch.fused:
        (query, key, value, *rest), options = watch.fused[layer]
        mask = rest[0] if rest else options.get("attn_mask")
        biased = scores(query, key)
        if mask is not None:
            biased = biased.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else biased + mask
        elif options.get("is_causal"):
            biased = biased.masked_fill(torch.ones_like(biased, dtype=torch.bool).triu(1), -torch.inf)
        probs = biased.softmax(-1), "derived: softmax of the scores and the mask that the fused attention got"
    elif len(watch.products.get(layer, ())) == 2:
        (query, key), (weights, value) = watch.products[layer]
        key, probs = key.mT, (weights, "observed")
    else:
        return {}
    return {
        "query": (query, "observed"), "key": (once(key), "observed"), "value": (once(value), "observed"),
        "scores": (scores(query, key), "derived: query times key over the root of the head dimension"), "probs": probs,
    }  # fmt: skip


def _pieces(name: str) -> list[str]:
    """The modules that a model without W_pack has instead."""
    return [name.replace("W_pack", piece) for piece in ("q_proj", "k_proj", "v_proj")] if "W_pack" in name else []


def _layer(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)", name)
    return int(found[1]) if found else -1


def _numpy(x: torch.Tensor) -> np.ndarray:
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
