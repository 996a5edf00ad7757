"""Who may ask: addresses, tokens, and the pages of other web sites.

On the loopback address no token is needed. But a browser on this machine runs pages of other sites. Such a page may
name this machine by a name of its own (DNS rebinding): then the Host header has that name. Or it sends requests
blindly: then the Origin header says so. Both are refused. Any other address needs a token, which no such page has.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from refimpl.errors import InputError
from refimpl.serve.asks import RefusedError

LOCAL = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "192.168.1.7", "")]
    [True, True, True, False, False, False]
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Guard:
    """What a request must bring. `host`: the address served at; `token`: None if none is needed."""

    host: str
    token: str | None = None

    def __post_init__(self) -> None:
        if self.token is None and not is_loopback(self.host):
            raise InputError(
                f"{self.host or 'every address'} can be reached from other machines, so a token is needed; set "
                "REFIMPL_TOKEN or give --token, or serve at 127.0.0.1"
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise InputError("the token is empty or has characters that no HTTP header holds; choose another one")

    def check(self, headers: Mapping[str, str], public: bool = False) -> None:
        """Raises RefusedError for a request that may not be answered. `public`: what may be seen without a token."""
        host = headers.get("host", "")
        if is_loopback(self.host):
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            known = {*LOCAL, self.host, f"[{self.host}]"}
            if name.lower() not in known:
                said = f"the Host header is {host!r:.80}, expected localhost; is it another site's name?"
                raise RefusedError(403, said, code="forbidden_host")
            origin = headers.get("origin")
            if origin is not None and origin.lower() != f"http://{host.lower()}":
                raise RefusedError(403, f"the page {origin!r:.80} may not use this server", code="forbidden_origin")
        if self.token is not None and not public:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not same(given.strip(), self.token):
                raise RefusedError(
                    401, "the request has no token, or a wrong one; send Authorization: Bearer TOKEN", None,
                    "invalid_api_key", {"www-authenticate": "Bearer"},
                )  # fmt: skip


def same(given: str, token: str) -> bool:
    """Whether two texts are equal, in a time that does not depend on how much of them is."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, token)]
    return hmac.compare_digest(*digests)
