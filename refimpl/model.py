"""`load` a checkpoint, and what can be done with the `Model` that it gives."""

from __future__ import annotations

import hashlib
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.checkpoint.folder import Checkpoint
from refimpl.checkpoint.weights import Weights
from refimpl.config import Config
from refimpl.decoder import Decoder
from refimpl.errors import InputError
from refimpl.forward import Forward
from refimpl.grids.simulate import Simulated

if TYPE_CHECKING:
    from refimpl.blocks.importance import Importance
    from refimpl.blocks.quantize import Recipe
    from refimpl.grids.encodings import Encodings
    from refimpl.trace import Trace
    from refimpl_kernels.affine import Rounding

EMBEDDED = Path(__file__).parent / "embedded"
KEPT = 3  # models that a process keeps: the reference, the judged one, and the one that it was quantized from


def load(path: str | Path | None = None, backend: str | None = None) -> Model:
    """The model in a Hugging Face style folder; without a path, the small trained Baichuan2 of this package.

    `backend`: see `Model.with_backend`.

    Weights are mapped, not read: a 15 GB checkpoint opens at once, and only what is used takes memory.
    Raises InputError, in one line, for whatever is missing, damaged or not understood. Warns (`refimpl.errors.Remark`)
    of weights that are not what their config says (`checkpoint.doctor`), and of another model's tokenizer.
    """
    if not isinstance(path, str | Path | None):
        raise InputError(f"the path is {path!r:.60}, expected a str or a Path")
    checkpoint = Checkpoint.read(EMBEDDED if path is None else path)
    made = (("load", None if path is None else str(checkpoint.folder.resolve()), backend),)
    return Model(checkpoint.config, checkpoint.weights, checkpoint.folder, backend, made)


class Model(Forward):
    """A config and weights, and the one forward over them. Immutable; `quantize` gives another model.

    `made`: the calls that made it, (method, *arguments) each and "load" first; None if it was put together in memory.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        folder: Path | None = None,
        backend: str | None = None,
        made: tuple[tuple, ...] | None = None,
        decoder_class: type[Decoder] = Decoder,
    ):
        super().__init__(config, weights, folder, backend, decoder_class)
        self.made = made

    def __repr__(self) -> str:
        c = self.config
        return f"Model({c.family}, {c.num_hidden_layers} layers, hidden {c.hidden_size}, vocabulary {c.vocab_size})"

    def __reduce__(self):
        """A model is pickled as the calls that made it. The process that unpickles it loads the weights for itself."""
        decoder = self.decoder_class
        if _importable(decoder.__module__, decoder.__qualname__) is not decoder:
            raise InputError(
                f"{decoder.__qualname__} cannot be sent to other processes, which import it under its name; define it "
                "at the top of a module"
            )
        return remade, (self._made(), self.backend)

    @property
    def identity(self) -> tuple:
        """What tells this model from others in every process: the calls that made it, its backend, its files."""
        return self._made(), self.backend, _stamps(self._made())

    def _made(self) -> tuple[tuple, ...]:
        if self.made is None:
            raise InputError("a model that was put together in memory has no name elsewhere; save it, and load that")
        return self.made

    def _then(self, call: tuple, **changed: Any) -> Model:
        """The model that one more call, (method, *arguments), makes of this one, with these parts changed."""
        made = None if self.made is None else (*self.made, call)
        parts = {"config": self.config, "weights": self.weights, "folder": self.folder, "made": made,
                 "backend": self.asked_backend, "decoder_class": self.decoder_class}  # fmt: skip
        return Model(**{**parts, **changed})

    def with_backend(self, backend: str) -> Model:
        """This model computed by "numpy" or by "numba", which is faster for large weights in float32.

        "numba-int16" and "numba-int8" also round activations. Without a choice, the environment's REFIMPL_BACKEND
        decides. Without that, Numba computes models that are large enough: see `refimpl.backends`.
        """
        return self._then(("with_backend", backend), backend=backend)

    def with_decoder(self, decoder_class: type[Decoder]) -> Model:
        """This model computed by a subclass of `refimpl.decoder.Decoder`: to try a change, or to break it on purpose.

        All that is made of the model keeps the class: quantized and simulated models, traces, batches, the cache.
        Other processes import it under its name, so a sweep over processes needs a class at the top of a module.
        Raises InputError for anything but a subclass of `Decoder`.

        >>> from refimpl import load
        >>> class WithoutPositions(Decoder):
        ...     def rope(self, x, cos, sin):
        ...         return x
        >>> model = load()
        >>> bool(abs(model.with_decoder(WithoutPositions)([5, 6, 7]) - model([5, 6, 7])).max() > 1)
        True
        """
        if not (isinstance(decoder_class, type) and issubclass(decoder_class, Decoder)):
            raise InputError(f"the decoder is {decoder_class!r:.80}, expected a subclass of refimpl.decoder.Decoder")
        return self._then(("with_decoder", decoder_class), decoder_class=decoder_class)

    def quantize(
        self, recipe: Recipe = "int4", block_size: int | str | None = None, keep: Sequence[str] = (),
        importance: Importance | None = None, **options: Any,
    ) -> Model:  # fmt: skip
        """This model with matrices in blocks of number formats, as a recipe says.

        The recipe is a format of the table in `formats/table.py`, such as "int4" or "q4_0". "nf4" and "int8" are the
        official `quantize(4)` and `quantize(8)`. Or it is a mapping of globs to formats, where the first glob that
        matches decides: `{"lm_head": "q8_0", "*": {"format": "q4_k", "search": "mse"}}`. `keep`: globs on the names of
        modules that stay unquantized. `options` go with a format's name and are fields of `blocks.quantize.Scheme`:
        axis, search, symmetric, double. `importance` tells a search what an error in each input column costs
        (`refimpl.blocks.importance`).

        Raises InputError for a format or option that does not exist, a glob that matches nothing, a matrix that does
        not fit its format, and for NaN and infinity.
        """
        from refimpl.blocks.quantize import quantize_weights

        given = options if block_size is None else {"block_size": block_size, **options}
        weights = quantize_weights(self.weights, recipe, keep, importance, **given)
        return self._then(("quantize", weights.provenance["recipe"], None, (), importance), weights=weights)

    def gradients(
        self, ids, labels, wrt: str = "*", dtype: str = "float32", attention_mask=None,
        z_loss_weight: float | None = None, recompute: bool = False,
    ) -> tuple[float, Trace]:  # fmt: skip
        """The training loss (`refimpl.loss.loss`) and its gradients by every parameter and tap, last to first.

        `labels` (B, T): the ids themselves, -100 where one does not count. `wrt`: a glob on names, to have some of
        them. `dtype`: "float32" or "float64". `recompute`: keep the stream between layers only, and compute a layer
        once more on the way back: less memory, the same bits.

        Raises InputError for labels that do not fit the ids, for a name that nothing has, and for a loss that is not
        finite: the message names the first tensor that is not.

        >>> from refimpl import load
        >>> model = load()
        >>> loss, gradients = model.gradients([5, 6, 7], [5, 6, 7], wrt="model.norm*")
        >>> f"{loss:.2f}", {name: gradient.shape for name, gradient in gradients.items()}
        ('...', {'model.norm': (1, 3, 256), 'model.norm.weight': (256,)})
        """
        from refimpl.gradients.backward import gradients

        return gradients(self, ids, labels, wrt, dtype, attention_mask, z_loss_weight, recompute)

    def simulate(self, encodings: Encodings, rounding: Rounding = "away", integer: bool = False) -> Model:
        """This model as a quantized device computes it (see `refimpl.grids.simulate`).

        `rounding`: "away", AIMET's, or "even", that of ONNX. `integer` sums the products of codes exactly.
        Raises InputError for encodings of another model.
        """
        return SimulatedModel(self, encodings, rounding, integer)

    def truncated(self, layers: int) -> Model:
        """The first `layers` layers of this model, then its final norm and head: to try things cheaply.

        Raises InputError for fewer than one layer, and for more than the model has.
        """
        if type(layers) is not int or not 1 <= layers <= self.config.num_hidden_layers:
            raise InputError(f"layers is {layers!r:.40}, expected 1 to {self.config.num_hidden_layers}")
        config = replace(self.config, num_hidden_layers=layers)
        cut_off = tuple(f"model.layers.{i}." for i in range(layers, self.config.num_hidden_layers))
        return self._then(("truncated", layers), config=config, weights=self.weights.without(cut_off))

    def generate(self, ids, **options) -> Iterator:
        """Token ids one by one, up to and including the end-of-sequence id: see `refimpl.generation.generate`."""
        from refimpl.generation import generate

        return generate(self, ids, **options)

    @property
    def checkpoint(self) -> Checkpoint:
        """Folder, config and weights, as `save` writes them. Raises InputError for a model without a folder."""
        if self.folder is None:
            raise InputError("the model comes from no folder, so there is no config.json to save with it")
        return Checkpoint(self.folder, self.config, self.weights)

    def save(self, out: str | Path) -> dict[str, Any]:
        """Writes a new folder that `load` reads, with the weights as this model has them, quantized ones too."""
        from refimpl.blocks.save import save

        return save(self.checkpoint, out)


class SimulatedModel(Simulated, Model):
    """A model with the forward of `Simulated`. `model.simulate(encodings)` makes one."""

    def __init__(self, model: Model, encodings: Encodings, rounding: Rounding = "away", integer: bool = False):
        super().__init__(model, encodings, rounding, integer)
        self.plain = model
        self.made = None if model.made is None else (*model.made, ("simulate", encodings, rounding, integer))

    def with_decoder(self, decoder_class: type[Decoder]) -> Model:
        """The simulation of `plain` with this decoder."""
        return SimulatedModel(self.plain.with_decoder(decoder_class), self.encodings, self.rounding, self.integer)

    def truncated(self, layers: int) -> Model:
        """The simulation of the first layers of `plain`."""
        plain = self.plain.truncated(layers)
        return SimulatedModel(plain, self.encodings.of(plain.config, plain.weights), self.rounding, self.integer)

    def with_backend(self, backend: str) -> Model:
        """This model, for "numpy". Other backends do not quantize between operations, and raise InputError."""
        if backend != "numpy":
            raise InputError(f"the backend is {backend!r}, but a simulation is computed by 'numpy'")
        return self

    def quantize(self, *arguments, **options) -> Model:
        """Raises InputError: the grids of a simulation belong to the weights that it was made of."""
        raise InputError("a simulated model cannot be quantized or simulated again; take the model that it was made of")

    simulate = quantize


def _importable(module: str, name: str) -> Any:
    """What another process finds under a dotted name in a module, or None."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _stamps(made: tuple) -> tuple:
    """Names, sizes and times of the files that a model is loaded from: if they change, so does the model."""
    folder = Path(made[0][1] or EMBEDDED)
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".json"))
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)


_lock = threading.RLock()
_kept: dict[bytes, Model] = {}


def remade(made: tuple, backend: str) -> Model:
    """The model that these calls make. A process makes each once, and keeps the last few."""
    classes = [id(value) for call in made for value in call if isinstance(value, type)]  # a name may get another class
    key = hashlib.sha256(pickle.dumps((made, backend, _stamps(made), classes))).digest()
    with _lock:
        model = _kept.pop(key, None)
        if model is None:
            *before, (method, *arguments) = made
            if before:
                model = getattr(remade(tuple(before), backend), method)(*arguments)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the process that asked for the work has warned of this checkpoint
                    model = load(*arguments)
            if model.backend != backend:  # this process would have chosen another, with other last bits
                model = model.with_backend(backend)
        _kept[key] = model
        while len(_kept) > KEPT:
            del _kept[next(iter(_kept))]
    return model
