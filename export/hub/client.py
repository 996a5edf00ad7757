"""The `qai-hub` client: how it is connected by its client.ini, and its errors as one line that says what to do."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from refimpl.errors import InputError

PUBLIC = "https://workbench.aihub.qualcomm.com"

# What AI Hub says when a job fails (a pattern), and the likely cause.
CAUSES = [
    (r"exit code 14|conversion to context binary failed", "an operation or a Reshape at the graph's ends that the "
     "device's compiler cannot place; compile fewer layers a part to find it"),
    (r"non-identical quantization parameters", "an encoding is missing, or differs, where two parts meet or on a "
     "cache's way in and out"),
    (r"\b3110\b|op(eration)? (config )?validation|datatype.*not supported", "an operation has a type that the device "
     "lacks, such as bool"),
    (r"\b1002\b|context.*memory|(device|out of).*memory|\boom\b", "the part is too large for the device; "
     "export more parts, of 1 to 2 GB"),
    (r"skel|ufixed_point_16", "16-bit inputs and outputs fail on this device; try one with Hexagon v75 or later"),
    (r"ir.?version", "the ONNX file is of a newer kind; export with ir_version=10 at most"),
    (r"opset", "export with opset 17 or 18"),
    (r"com\.microsoft", "an operation of ONNX Runtime is in the graph; AI Hub takes ONNX's own only"),
    (r"int64|64.?bit", "an input or output has 64 bits; give --compile-options=--truncate_64bit_io"),
    (r"external data|model\.data|weights? file", "the weights did not come along; export again"),
    (r"dynamic", "a shape is not static"),
    (r"dsp.*version|hexagon.*version|htp.*arch", "the binary is for another Hexagon version; name the device it was "
     "compiled for"),
    (r"(qnn|qairt|sdk).*version", "the runtimes differ; give one --qairt to all jobs"),
    (r"2 ?gib|protobuf.*size|too large", "the upload is too large; export more parts"),
    (r"schema|does not match|input.*(order|shape|dtype)", "the inputs are not in the graph's order or shapes"),
    (r"busy|provision|timed? ?out|unavailable|internal", "the device farm's own trouble; run again with --retry"),
]  # fmt: skip


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the network or the server failed, or there were too many requests."""
    import requests
    from qai_hub.client import InternalError, RateLimitedError
    from qai_hub.public_rest_api import APIException

    if isinstance(error, InternalError) and error.__cause__ is not None:
        return transient(error.__cause__)
    if isinstance(error, APIException):
        return (error.status_code or 0) >= 500 or error.status_code == 429
    return isinstance(error, (RateLimitedError, requests.exceptions.RequestException))


def advice(reason: str, url: str) -> str:
    """The client's reason, and what to do about it, if that is known."""
    if re.search(r"authenticat", reason, re.I):
        return f"the token in {config_path()} is not valid at {url}; make a new one in your account there"
    if re.search(r"too large", reason, re.I):
        return f"{reason[:200]}; export more parts"
    if re.search(r"parsing message|DecodeError|wire", reason, re.I):
        return "it did not answer as AI Hub does; is there a proxy in between, or is --api-url wrong?"
    cause = likely(reason)
    return f"{reason[:300]}" + (f"; likely {cause}" if cause else "")


def likely(reason: str) -> str:
    """The likely cause of a job's failure, or ""."""
    return next((cause for pattern, cause in CAUSES if re.search(pattern, reason, re.I)), "")


def one_line(text: str) -> str:
    """A message without the frame that the client draws, on one line."""
    text = re.sub(r"[┌┐└┘─│]|^\| | \|$", " ", text, flags=re.M)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def config_path() -> str:
    """The path of the client's configuration."""
    from qai_hub.api_utils import get_config_path

    return get_config_path()


def configured() -> dict[str, str]:
    """The settings in client.ini, unchecked; {} if it cannot be read."""
    import configparser

    try:
        parser = configparser.ConfigParser(interpolation=None)
        parser.read([os.path.expanduser(os.environ.get("QAIHUB_CLIENT_INI", "~/.qai_hub/client.ini"))])
        return dict(parser["api"])
    except (KeyError, configparser.Error, UnicodeDecodeError, OSError):
        return {}


def connect(url: str) -> Any:
    """A client for a server, with the token of client.ini. A server on this machine needs no token, and gets none.

    Raises InputError if there is no token, or if it would be sent unencrypted.
    """
    from qai_hub import Client
    from qai_hub.api_utils import load_default_api_config
    from qai_hub.public_rest_api import ClientConfig

    split = urlsplit(url)
    if split.scheme not in ("http", "https") or not split.hostname:
        raise InputError(f"{url!r} is not an address such as {PUBLIC}")
    here = is_here(split.hostname)
    config = None
    try:
        config = load_default_api_config()
    except FileNotFoundError:
        reason = "is not there"
    except Exception:  # its own reader raises many kinds
        reason = "cannot be read, or lacks api_token, api_url or web_url"
    if not here and (config is None or not config.api_token.strip()):
        raise InputError(
            f"no token for AI Hub: {config_path()} {reason if config is None else 'has an empty token'}; run "
            f"`qai-hub configure --api_token TOKEN` with the token of your account at {PUBLIC}"
        )
    if here and (config is None or urlsplit(config.api_url).netloc != split.netloc):
        config = ClientConfig(api_token="loopback", api_url=url, web_url=url)
    assert config
    if split.scheme == "http" and not here:
        raise InputError(f"{url} is not encrypted, and would be sent your token; use https")
    config.api_url, config.verbose = url, sys.stderr.isatty()
    return Client(config)


def expect_answer(url: str, patience: float) -> None:
    """Raises InputError if an address gives no answer for `patience` seconds; the client would try for minutes.

    Any answer will do: whether it is AI Hub shows when the client asks. No token is sent.
    """
    import requests

    until, told = time.monotonic() + patience, False
    while True:
        try:
            requests.head(url, timeout=(5, 10), allow_redirects=False)
            return
        except requests.exceptions.RequestException as error:
            said = one_line(str(error))
            why = re.search(r"Errno -?\d+\] ([^'\")]+)|Read (timed out)", said)
            reason = why[1] or why[2] if why else said[:200]
        if time.monotonic() + 2 > until:
            raise InputError(f"no connection to {url}: {reason}; is the address right, and is this machine online?")
        if not told:
            print(f"no connection to {url} yet; trying for {patience:.0f} seconds", file=sys.stderr)
        told = True
        time.sleep(2)


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def version() -> str:
    """The client's version."""
    import qai_hub

    return str(qai_hub.__version__)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder, removed at the end, for what the client leaves behind, such as the zips of its uploads."""
    before = tempfile.tempdir
    folder = tempfile.mkdtemp(prefix="refimpl-hub-")
    tempfile.tempdir = folder
    try:
        yield Path(folder)
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
