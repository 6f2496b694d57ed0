"""What every request passes before it is read: who may ask, and from where."""

import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from k2jax.serve.refusal import Refusal

OPEN = ("/", "/health")  # answered without a key


def check_key(headers: Mapping[str, str], keys: Sequence[str]) -> None:
    """See that a request has one of the keys, in a time that does not depend on how near it is.

    Raises:
        Refusal: it has none.
    """
    if not keys:
        return
    kind, _, key = headers.get("authorization", "").partition(" ")
    sent = key.strip().encode() if kind.lower() == "bearer" else b""
    same = [hmac.compare_digest(sent, known.encode()) for known in keys]
    if not any(same):
        message = "the API key is wrong" if sent else "an API key is needed: 'Bearer KEY'"
        headers_ = {"www-authenticate": "Bearer"}
        raise Refusal(message, status=401, code="invalid_api_key", headers=headers_)


def check_origin(headers: Mapping[str, str], hosts: Sequence[str]) -> None:
    """Refuse pages of other sites, which browsers let send requests to this machine.

    Args:
        headers: of the request.
        hosts: names that the server is asked by; none: any. A page of another site can give its
            own name the address of this machine, so a server without keys answers to few names.

    Raises:
        Refusal: the request comes from another site.
    """
    host = headers.get("host", "")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Refusal(f"pages of {origin} may not ask this server", status=403, code="origin")
    name = urlsplit(f"//{host}").hostname or ""
    if hosts and name not in hosts and not is_address(name):
        message = f"this server is not {name!r}; serve with an API key to be asked by any name"
        raise Refusal(message, status=403, code="host")


def is_address(name: str) -> bool:
    """Whether a host is an IP address, which no site can take."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
