"""One server of AI Hub and a device there: requests that outlast a bad network, and what the server no longer has.

The `qai-hub` client tries each request again for half a minute; `call` goes on for ten. A server forgets jobs, models
and datasets after a while: then their entries in the ledger lose their ids, and what needs them is sent again.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from export.hub.client import advice, connect, expect_answer, one_line, transient
from export.run.ledger import Ledger
from refimpl.errors import InputError, at_most

FIRST = 20.0  # seconds in which a server must answer at all
PATIENCE = 600.0  # seconds for which a request is tried again, once the server has answered
PAGES = 20  # of 50 jobs, models or datasets, that are searched for a name
T = TypeVar("T")


class GoneError(Exception):
    """AI Hub no longer has something that the ledger knows. Its entry has no id any more: it may be sent again."""


class Connection:
    """AI Hub at an address, the device of a name there, and the ledger of what was sent to it."""

    def __init__(self, url: str, device: str, ledger: Ledger):
        if not device.strip():
            raise InputError("the device has no name; give one of AI Hub's, such as 'Samsung Galaxy S25'")
        self.url, self.device, self.ledger = url, device, ledger
        self.new = set[str]()  # keys of what was sent over this connection
        self._client: Any = None
        self._device_found = False

    @property
    def client(self) -> Any:
        """The `qai-hub` client, connected by client.ini."""
        if self._client is None:
            client = connect(self.url)
            expect_answer(self.url, FIRST)
            self._client = client
        return self._client

    def call(self, what: str, action: Callable[[], T], uses: Sequence[str] = ()) -> T:
        """The result of the client's `action`, which is tried again while the network or the server fails.

        `uses`: keys of what the request refers to. Raises GoneError if the server no longer has one of them, and takes
        the id from its entry; InputError for everything else.
        """
        until, pause = time.monotonic() + PATIENCE, 1.0
        while True:
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # the client prints
                    return action()
            except (InputError, GoneError):
                raise
            except Exception as error:  # the client raises its own, and those of the libraries that it uses
                reason = one_line(str(error)) or type(error).__name__
                lacking = self._lacking(what, error, reason, uses)
                if time.monotonic() + pause > until:
                    raise InputError(
                        f"no {lacking} {self.url} while trying to {what}: {reason[:200]}; "
                        "run the same command again, it goes on where it stopped"
                    ) from None
            left = (until - time.monotonic()) / 60
            tqdm.write(f"no answer from {self.url} to {what}; trying for {left:.0f} minutes more", file=sys.stderr)
            time.sleep(pause)
            pause = min(2 * pause, 60.0)

    def _lacking(self, what: str, error: Exception, reason: str, uses: Sequence[str]) -> str:
        """A few words on what failed, if the request may succeed later; otherwise raises as `call` does."""
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise InputError(f"cannot {what}: {tempfile.gettempdir()} is full; make room, or set TMPDIR") from None
        if uses and (number := missing(reason)):
            entries = {key: self.ledger.get(key) for key in uses}
            named = [k for k, e in entries.items() if number in (e.get("id"), e.get("target"))] or uses
            if not self.new.intersection(named):
                if not self._is_gone(number):
                    return "sure answer from"
                for key in named:
                    self.forget(key)
                raise GoneError(reason) from None
        if not transient(error):
            raise InputError(f"AI Hub did not {what}: {advice(reason, self.url)}") from None
        return "connection to"

    def _is_gone(self, number: str) -> bool:
        """Whether AI Hub itself says that it has no such job, model or dataset, or that the dataset has expired.

        The client believes every 404, even that of a proxy's page. So the server is asked for its devices, which it
        must know, and then once more for the thing itself.
        """
        from qai_hub.public_rest_api import APIException

        rest, config = self._rest(), self.client.config
        try:
            rest.get_device_list(config, self.device)
            for ask in (rest.get_job, rest.get_model, rest.get_dataset):
                try:
                    found = ask(config, number)
                except APIException as error:
                    if error.status_code != 404:
                        return False
                    continue
                if ask is not rest.get_dataset or not found.HasField("expiration_time"):
                    return False
                return found.expiration_time.seconds < time.time()
        except Exception:  # a failed request does not prove that the thing is gone
            return False
        return True

    def forget(self, key: str) -> None:
        """Takes the id from an entry of the ledger, because the server no longer has what it names."""
        if self.ledger.get(key):
            self.ledger.write(key, id=None, name=None, state=None, target=None, expires=None)

    @staticmethod
    def _rest() -> Any:
        from qai_hub import public_rest_api

        return public_rest_api

    # The device

    def _device(self) -> Any:
        from qai_hub import Device

        return Device(self.device)

    def _check_device(self) -> None:
        """Raises InputError unless the device exists and runs QNN models. Asked before anything is sent."""
        if self._device_found:
            return
        found = self.call("ask for the device", lambda: self.client.get_devices(self.device))
        if not found:
            import difflib

            names = sorted({device.name for device in self.call("ask for devices", self.client.get_devices)})
            close = difflib.get_close_matches(self.device, names, 3, 0.3) or names
            raise InputError(f"AI Hub has no device {self.device!r}; it has {at_most(close, 3)}")
        if not any("framework:qnn" in device.attributes for device in found):
            raise InputError(f"{self.device} does not run QNN models; choose a device with framework:qnn")
        self._device_found = True

    # The id of something that was sent under a name; "" if the server has none. It is asked when the id was lost.

    def _find_job(self, name: str) -> str:
        return self._find(lambda o: self.client.get_job_summaries(offset=o), name, lambda job: job.job_id)

    def _find_dataset(self, name: str) -> str:
        return self._find(lambda o: self.client.get_datasets(offset=o), name, lambda data: data.dataset_id,
                          lambda data: self._rest().get_dataset(self.client.config, data.dataset_id))  # fmt: skip

    def _find_model(self, name: str) -> str:
        return self._find(lambda o: self.client.get_models(offset=o), name, lambda model: model.model_id,
                          lambda model: self._rest().get_model(self.client.config, model.model_id))  # fmt: skip

    def _find(self, page: Callable[[int], list], name: str, number: Callable[[Any], str],
              detail: Callable[[Any], Any] | None = None) -> str:  # fmt: skip
        """The id of the newest thing with a name, or "". An upload counts only if it was completed."""
        for i in range(PAGES):
            some = page(50 * i)
            for one in some:
                if one.name == name and (detail is None or detail(one).file_upload_complete):
                    return number(one)
            if not some:
                break
        return ""


def missing(reason: str) -> str:
    """The id that the client's message says is not there, or ""."""
    if not re.search(r"could not be found|expired", reason, re.I):
        return ""
    number = re.search(r"\bid ?='?([A-Za-z0-9_-]+)'|\bID '([A-Za-z0-9_-]+)'", reason)
    return (number[1] or number[2]) if number else ""
