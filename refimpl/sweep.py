"""Long work in pieces, computed by this process, others or a cluster, and resumed where it stopped.

A sweep is a function and the arguments of each piece. Results come in the order of the pieces. NumPy's BLAS has one
thread for each piece, because its last bits depend on the number of threads. So the outcome has the same bits, whoever
computes which piece, on machines of one kind. (A BLAS has other kernels for other processors. The Numba backend has the
same bits everywhere, at any number of threads.)

An executor is anything with the `submit(function, *arguments)` of Python's concurrent.futures: `ProcessPoolExecutor`,
`dask.distributed.Client(...).get_executor()`, adapters of Ray and others. Little is sent: a model travels as the calls
that made it (see `Model.__reduce__`), and each process maps the files and quantizes for itself. So all processes must
see the same files under the same paths.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
import pickle
import platform
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from refimpl.errors import InputError
from refimpl.files import write_safetensors
from refimpl.version import __version__

Result = Mapping[str, np.ndarray]
IN_FLIGHT = 128  # the most pieces under way at a time, and so the most results that wait for an earlier one
PATIENCE = 10  # seconds until a Dask scheduler answers
THREADS = "NUMBA_NUM_THREADS"


class Pool(Protocol):
    """An executor, which computes pieces."""

    def submit(self, function: Callable, /, *arguments: Any) -> Any: ...


def sweep(
    function: Callable[..., Result],
    pieces: Sequence[tuple],
    what: str | None,
    executor: Pool | None = None,
    resume: str | Path | None = None,
) -> Iterator[Result]:
    """`function(*piece)` of each piece, in order. `what` is shown beside the progress bar; None hides the bar.

    `executor`: None computes here. `resume`: a folder that keeps finished results. Another sweep with the same models,
    files and options reads them from there. Raises InputError if a worker dies.
    """
    from threadpoolctl import threadpool_limits

    store = None if resume is None else _Store(Path(resume))
    progress = tqdm(total=len(pieces), desc=what, unit="piece", disable=True if what is None else None, leave=False)
    with progress, threadpool_limits(1, "blas"):
        for result in _results(function, pieces, executor, store):
            progress.update()
            yield result


def elsewhere(home: tuple[str, int], sent: bytes) -> Result | tuple[Exception, str]:
    """Computes a pickled piece in the process that calls this, where BLAS gets one thread.

    An exception of the piece is returned, with its traceback. So it differs from one of the executor, which is raised.
    `home` is the process that sent the piece.
    """
    try:
        function, piece = pickle.loads(sent)
    except (AttributeError, ImportError) as error:
        problem = f"a worker cannot import what it was sent ({error!s:.99}); define it in a module that workers have"
        return InputError(problem), traceback.format_exc()
    if home != here():
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, "blas")  # for good: a worker does nothing else
    try:
        return function(*piece)
    except Exception as error:
        return error, traceback.format_exc()


class _Sent:
    """A piece that was given to an executor. An exception of the executor means that the piece will not be computed."""

    def __init__(self, executor: Pool, function: Callable, piece: tuple):
        sent = pickle.dumps((function, piece))  # an argument that cannot be pickled is not the executor's fault
        with self._asking():
            self.future = executor.submit(elsewhere, here(), sent)

    def result(self) -> Result:
        with self._asking():
            found = self.future.result()
        if isinstance(found, tuple):
            error, told = found
            raise error from RuntimeError(f"in a worker:\n{told}")
        return found

    def cancel(self) -> None:
        with suppress(Exception):  # the executor may be gone
            self.future.cancel()

    @staticmethod
    @contextmanager
    def _asking() -> Iterator[None]:
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            hint = "use fewer --jobs, or look at its log"
            raise InputError(f"a worker died, for lack of memory or with its cluster; {hint} ({said:.80})") from None


def here() -> tuple[str, int]:
    """The machine and the id of this process."""
    return platform.node(), os.getpid()


def _results(function, pieces, executor, store) -> Iterator[Result]:
    waiting: deque[tuple[_Sent | None, Callable[[], Result]]] = deque()  # with what gives the result

    def begin(piece) -> tuple[_Sent | None, Callable[[], Result]]:
        key = store.key(function, piece) if store else ""
        found = store.read(key) if store else None
        if found is not None:
            return None, lambda: found
        sent = _Sent(executor, function, piece) if executor else None
        compute = sent.result if sent else lambda: function(*piece)
        return sent, (lambda: store.write(key, compute())) if store else compute

    todo = iter(pieces)
    try:
        while True:
            waiting.extend(map(begin, islice(todo, IN_FLIGHT - len(waiting) if executor else 1)))
            if not waiting:
                return
            yield waiting.popleft()[1]()
    finally:
        for sent, _ in waiting:
            if sent:
                sent.cancel()


class _Store:
    """A folder of results. Each is a safetensors file, whose name is the hash of the function and its arguments."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot keep results in {folder}: {error.strerror}; name a folder") from None

    def key(self, function: Callable, piece: tuple) -> str:
        said = (__version__, function.__module__, function.__qualname__, _described(piece))
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def read(self, key: str) -> Result | None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(self.folder / f"{key}.safetensors")
        except (FileNotFoundError, SafetensorError):  # not there, or cut short: it is computed again
            return None

    def write(self, key: str, result: Result) -> Result:
        arrays = {k: np.ascontiguousarray(v) for k, v in result.items()}
        write_safetensors(self.folder / f"{key}.safetensors", arrays)
        return result


def _described(argument: Any) -> Any:
    """Plain values that identify an argument, with the same repr in every process."""
    if isinstance(argument, type):
        return argument.__qualname__, _source(argument)
    if hasattr(argument, "identity"):  # a model
        return _described(argument.identity)
    if isinstance(argument, tuple | list):
        return tuple(map(_described, argument))
    if isinstance(argument, Mapping):
        return tuple((k, _described(v)) for k, v in argument.items())
    if isinstance(argument, np.ndarray):
        return argument.dtype.str, argument.shape, hashlib.sha256(argument.tobytes()).hexdigest()
    if argument is None or isinstance(argument, str | int | float):
        return argument
    return hashlib.sha256(pickle.dumps(argument)).hexdigest()


def _source(decoder: type) -> str:
    """The source of a class and of its bases outside of this package: if it changes, so may every result."""
    bases = [base for base in decoder.__mro__ if base.__module__.partition(".")[0] not in ("refimpl", "builtins")]
    try:
        return "".join(map(inspect.getsource, bases))
    except (OSError, TypeError):
        raise InputError(
            f"the source of {decoder.__qualname__} is in no file, so a later run cannot tell whether it has changed; "
            "put it into a module, or sweep without resume"
        ) from None


@contextmanager
def workers(jobs: int = 1, dask: str | None = None) -> Iterator[Pool | None]:
    """An executor: a Dask cluster at an address (extra: dask), or `jobs` processes here, or None for one job.

    The processes here share the cores. Raises InputError for fewer than one job, and if no cluster answers.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}, expected how many processes to use")
    if dask is not None and jobs != 1:
        raise InputError("give either jobs or a Dask cluster, which has its own workers")
    if dask is not None:
        with _dask_client(dask) as client:
            yield client.get_executor(pure=False)
    elif jobs == 1:
        yield None
    else:
        with _process_pool(jobs) as pool:
            yield pool


def _dask_client(address: str):
    try:
        from dask.distributed import Client, Security
        from distributed.comm import connect
    except ImportError:
        raise InputError("a Dask cluster needs the extra dask: pip install 'refimpl[dask]'") from None

    async def knock() -> None:
        comm = await connect(address, PATIENCE, **Security().get_connection_args("client"))
        await comm.close()

    try:
        asyncio.run(knock())  # a client that gets no answer takes longer to end than to begin
        return Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # an address of another kind, without TLS' keys, …
        hint = "give one such as tcp://10.0.0.1:8786"
        raise InputError(f"no Dask scheduler answers at {address!r:.80}: {error!s:.80}; {hint}") from None


@contextmanager
def _process_pool(jobs: int):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # New processes, because forks would inherit threads' locks. They read this variable when they begin.
    before = os.environ.get(THREADS)
    os.environ[THREADS] = before or str(max(1, (os.cpu_count() or 1) // jobs))
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ[THREADS]
