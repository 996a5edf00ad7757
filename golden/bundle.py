"""A golden on disk: a folder with the tensors of a few prompts in a few number formats, and where they come from.

    tensors.safetensors     {case}/{dtype}/{name} -> tensor                p0/float64/model.layers.0.self_attn.W_pack
    manifest.json           the prompts, each tensor's shape, sha256, origin and tolerance, and the provenance

A case is one prompt. A name is that of a tap (`refimpl.names`). `origin` says how PyTorch showed the tensor:
"observed", or "derived" from observed tensors, and how. A trace on disk (`write_trace`) has the same two files; its
keys are plain names, and it has no cases.

Both files are untrusted: a damaged one raises InputError and nothing else. Names never become paths.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from golden.tolerance import ROUNDINGS, Tolerance
from refimpl.checkpoint.safetensors_files import map_safetensors
from refimpl.config import Config
from refimpl.errors import InputError, at_most
from refimpl.files import read_json, sha256, whole_folder, write_safetensors
from refimpl.trace import Trace, prompt_of

GOLDEN, TRACE = "refimpl golden 1", "refimpl trace 1"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt: `ids` (B, T) int64, `attention_mask` (B, T) int64 or None, and the text, if it was one."""

    ids: np.ndarray
    attention_mask: np.ndarray | None = None
    text: str | None = None


@dataclass(frozen=True, eq=False)
class Golden:
    """What a folder holds: `cases`, name -> Case; the `dtypes` recorded; the model's `config` and `provenance`."""

    folder: Path
    cases: dict[str, Case]
    dtypes: tuple[str, ...]
    config: Config
    provenance: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(repr=False)

    def trace(self, case: str | None = None, dtype: str | None = None) -> Trace:
        """The tensors of a case in a number format, in computing order, mapped and not yet read.

        Neither needs a name if there is only one. `meta` holds what `golden.compare` judges by: the tolerances, the
        config and the dtype. Raises InputError for an unknown case or format, and for no name where there are several.
        """
        case, dtype = self._only(case, self.cases, "case"), self._only(dtype, self.dtypes, "format")
        if case not in self.cases or dtype not in self.dtypes:
            held = f"{at_most(self.cases)} in {at_most(self.dtypes)}"
            raise InputError(f"{self.folder} has no {case} in {dtype}, it has {held}; record it with golden make")
        prefix = f"{case}/{dtype}/"
        names = [key.removeprefix(prefix) for key in self.entries if key.startswith(prefix)]
        stated = {name: self.entries[prefix + name] for name in names}
        meta = {
            "engine": "pytorch", "family": self.config.family, "dtype": dtype, "config": asdict(self.config),
            "ids": prompt_of(self.cases[case].ids),
            "origin": {name: entry["origin"] for name, entry in stated.items()},
            "tolerance": {name: entry["tolerance"] for name, entry in stated.items()},
        }  # fmt: skip
        return Trace(((name, self._tensors[prefix + name]) for name in names), meta)

    def describe(self) -> str:
        """A few lines for a person about what is in it."""
        size = sum(array.nbytes for array in self._tensors.values())
        origins = [entry["origin"].split(":")[0] for entry in self.entries.values()]
        lines = [
            f"{self.folder}: {self.config.family}, {self.config.num_hidden_layers} layers, "
            f"hidden {self.config.hidden_size}, vocabulary {self.config.vocab_size}",
            f"{len(self.entries)} tensors, {size / 1e6:.1f} MB: {origins.count('observed')} observed in PyTorch, "
            f"{origins.count('derived')} derived from them",
        ]
        for name, case in self.cases.items():
            batch, tokens = case.ids.shape
            said = f" {case.text!r:.60}" if case.text else ""
            lines.append(f"  {name}: {batch} x {tokens} tokens in {', '.join(self.dtypes)}{said}")
        lines += [
            f"  {_brief(key)}: {_brief(value)}" for key, value in self.provenance.items() if value not in ({}, [])
        ]
        return "\n".join(lines)

    def _only(self, name: str | None, held: Collection[str], kind: str) -> str:
        if name is None and len(held) != 1:
            raise InputError(f"{self.folder} has {len(held)} {kind}s; say which one: {at_most(held)}")
        return next(iter(held)) if name is None else name

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        return map_safetensors(self.folder / "tensors.safetensors")


def write(
    folder: str | Path,
    config: Config,
    cases: Mapping[str, Case],
    traces: Mapping[tuple[str, str], Trace],
    provenance: Mapping[str, Any],
    tolerances: Mapping[str, Mapping[str, Tolerance]],
) -> None:
    """Stores a trace for each (case, dtype) in a new folder, all or nothing.

    `tolerances`: dtype -> tensor name -> Tolerance. A trace's `meta["origin"]`: name -> how PyTorch showed it.

    Raises InputError if the folder exists, or if a name has other characters than letters, digits, `_`, `.` and `-`.
    """
    tensors = {f"{case}/{dtype}/{name}": x for (case, dtype), trace in traces.items() for name, x in trace.items()}
    extra = {
        f"{case}/{dtype}/{name}": {"origin": trace.meta["origin"][name], "tolerance": asdict(tolerances[dtype][name])}
        for (case, dtype), trace in traces.items()
        for name in trace
    }
    manifest = {
        "config": asdict(config),
        "dtypes": list(dict.fromkeys(dtype for _, dtype in traces)),
        "cases": {
            name: {
                "text": case.text,
                "ids": case.ids.tolist(),
                "attention_mask": None if case.attention_mask is None else case.attention_mask.tolist(),
            }
            for name, case in cases.items()
        },
        "provenance": dict(provenance),
    }
    write_tensors(Path(folder), GOLDEN, manifest, tensors, extra)


def read(folder: str | Path, verify: bool = True) -> Golden:
    """The golden in a folder. With `verify`, the file is read once to compare its sha256 with the manifest's.

    Raises InputError for a folder that is missing, truncated, changed or not a golden.
    """
    folder = Path(folder)
    manifest, _ = read_tensors(folder, GOLDEN, verify)
    entries = manifest["tensors"]
    try:
        config = Config(**manifest["config"])
        cases = {name: read_case(name, stored, config) for name, stored in manifest["cases"].items()}
        dtypes = tuple(manifest["dtypes"])
        if not dtypes or not set(dtypes) <= ROUNDINGS.keys():
            raise InputError(f"the number formats are {dtypes!r:.60}, expected some of {', '.join(ROUNDINGS)}")
        if not cases or not entries or not isinstance(manifest["provenance"], dict):
            raise InputError("it has no cases, no tensors or no provenance")
        for key, entry in entries.items():
            case, dtype, name = key.split("/")
            if case not in cases or dtype not in dtypes:
                raise InputError(f"{key} belongs to no case and format that the manifest lists")
            expect_tolerance(name, entry["tolerance"])
            if not isinstance(entry["origin"], str):
                raise InputError(f"the origin of {key} is not a text")
    except InputError as error:
        raise InputError(f"{folder / 'manifest.json'}: {error}; record the golden again") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder / 'manifest.json'} is not a golden's ({what}); record the golden again") from None
    return Golden(folder, cases, dtypes, config, manifest["provenance"], entries)


def write_trace(folder: str | Path, trace: Trace) -> None:
    """Stores one trace in a new folder, all or nothing. Raises InputError if the folder exists."""
    write_tensors(Path(folder), TRACE, {"meta": trace.meta}, trace, {})


def read_trace(folder: str | Path, verify: bool = True, dtype: str | None = None) -> Trace:
    """The trace that `write_trace` stored, mapped and not yet read; `verify` and errors as in `read`.

    A golden with one case counts as a trace: in `dtype` if that was recorded, else in the finest format.
    """
    path = Path(folder) / "manifest.json"
    if path.is_file() and read_json(path).get("format") == GOLDEN:
        golden = read(folder, verify)
        return golden.trace(dtype=dtype if dtype in golden.dtypes else finest(golden.dtypes))
    manifest, tensors = read_tensors(Path(folder), TRACE, verify)
    try:
        meta = dict(manifest["meta"])
        if "config" in meta:
            Config(**meta["config"])
        for name, stored in meta.get("tolerance", {}).items():
            expect_tolerance(name, stored)
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}/manifest.json is not a trace's: {error}; write the trace again") from None
    return Trace(tensors, meta)


def finest(dtypes: Collection[str]) -> str:
    """The number format with the smallest rounding error."""
    return min(dtypes, key=lambda dtype: ROUNDINGS[dtype].unit)


def expect_new(folder: Path) -> None:
    """Raises InputError if `folder` holds something, because nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already; choose another place or delete it")


def expect_name(name: str, of: str = "a case") -> str:
    """`name`, if it is a valid one. Raises InputError if it is not."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r:.60} is not a name for {of}; expected letters, digits, '_', '.' and '-'")
    return name


def _digest(array: np.ndarray) -> str:
    """The hex sha256 of an array's bytes in C order."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def write_tensors(folder: Path, kind: str, manifest: Mapping, tensors: Mapping[str, Any], extra: Mapping) -> None:
    """Writes both files under a temporary name and renames the folder, so a half-written one never appears."""
    expect_new(folder)
    folder = folder.absolute()
    for part in {part for key in tensors for part in key.split("/")}:
        expect_name(part, "a tensor")
    arrays = {key: np.asarray(array, order="C") for key, array in tensors.items()}
    entries = {
        key: {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "sha256": _digest(array),
            **extra.get(key, {}),
        }
        for key, array in arrays.items()
    }
    with whole_folder(folder) as partial:
        write_safetensors(partial / "tensors.safetensors", arrays)
        content = {"format": kind, **manifest, "tensors": entries, "sha256": sha256(partial / "tensors.safetensors")}
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1)
        (partial / "manifest.json").write_text(text + "\n", encoding="utf-8")


def read_tensors(folder: Path, kind: str, verify: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest and the tensors that it lists. Raises InputError if they are not of this kind, or do not fit."""
    path, tensors_path = folder / "manifest.json", folder / "tensors.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} holds no manifest.json; expected the folder of a '{kind}'")
    manifest = read_json(path)
    if manifest.get("format") != kind:
        hint = "; a trace is read by golden.read_trace" if manifest.get("format") == TRACE else ""
        raise InputError(f"{path} is of format {manifest.get('format')!r:.60}, expected {kind!r}{hint}")
    entries = manifest.get("tensors")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path} lists no tensors; it is damaged, record it again")
    if not tensors_path.is_file():
        raise InputError(f"{tensors_path} is not there; a golden is two files, copy both")
    tensors = map_safetensors(tensors_path)
    for part in {part for key in tensors.keys() | entries.keys() for part in key.split("/")}:
        expect_name(part, "a tensor")
    if tensors.keys() != entries.keys():
        odd = at_most(sorted(tensors.keys() ^ entries.keys()), 3)
        raise InputError(f"{path} and tensors.safetensors disagree on {odd}; copy both files again")
    for key, entry in entries.items():
        array = tensors[key]
        if [str(array.dtype), list(array.shape)] != [entry.get("dtype"), entry.get("shape")]:
            said = f"{entry.get('dtype')} {entry.get('shape')}"
            raise InputError(f"{key} in {folder} is {array.dtype} {list(array.shape)}, its manifest says {said!s:.60}")
    if verify and sha256(tensors_path) != manifest.get("sha256"):
        changed = [k for k, x in tensors.items() if _digest(x) != entries[k].get("sha256")]
        which = f"these tensors changed: {at_most(changed, 3)}" if changed else "no tensor changed, but the file did"
        raise InputError(f"{tensors_path} has another sha256 than its manifest says; {which}; copy the golden again")
    return manifest, {key: tensors[key] for key in entries}


def expect_tolerance(name: str, stored: Mapping[str, Any]) -> None:
    """Raises InputError for a stored tolerance that is not valid."""
    tolerance = Tolerance(**stored)
    relative = tolerance.relative
    if type(relative) not in (int, float) or not 0 <= relative <= 1 or not isinstance(tolerance.reason, str):
        raise InputError(
            f"the tolerance of {name!r:.60} is {relative!r:.60}, expected a number from 0 to 1 and a reason"
        )


def read_case(name: str, stored: Mapping[str, Any], config: Config) -> Case:
    """The case that a manifest states. Raises InputError for ids, a mask or a text that cannot be one."""
    expect_name(name)
    ids, mask, text = np.array(stored["ids"]), stored["attention_mask"], stored["text"]
    if ids.ndim != 2 or not ids.size or ids.dtype.kind != "i" or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise InputError(f"the ids of {name} are not rows of numbers from 0 to {config.vocab_size - 1}")
    if mask is not None:
        mask = np.array(mask)
        if mask.shape != ids.shape or mask.dtype.kind != "i":
            raise InputError(f"the attention_mask of {name} does not fit its ids {ids.shape}")
    if not isinstance(text, str | None):
        raise InputError(f"the text of {name} is a {type(text).__name__}")
    return Case(ids, mask, text)


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else repr(text)
