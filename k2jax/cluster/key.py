"""The key that the processes of a run share: each proves that it has it, and none sends it."""

import hmac
import json
import os
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError

KEY, KEY_FILE = "K2JAX_CLUSTER_KEY", "K2JAX_CLUSTER_KEY_FILE"
SHORTEST = 16  # characters of a key


def read_key() -> bytes | None:
    """The key of the environment, or of the file it names; None: there is neither.

    Raises:
        ConfigError: the file cannot be read, or the key is too short to be a secret.
    """
    key, file = os.environ.get(KEY, "").strip(), os.environ.get(KEY_FILE, "").strip()
    if key and file:
        raise ConfigError(f"{KEY} and {KEY_FILE} are both set; unset one")
    source = KEY
    if file:
        source = f"{KEY_FILE} {file}"
        try:
            key = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{source} cannot be read") from None
    if not key and not file:
        return None
    if len(key) < SHORTEST:
        raise ConfigError(
            f"the key of {source} has {len(key)} characters; it must have at least {SHORTEST}"
        )
    return key.encode()


def prove(key: bytes, side: str, *facts: Any) -> str:
    """HMAC-SHA256 of what both sides know, in hexadecimal.

    Args:
        key: the shared one.
        side: who proves; a proof cannot be sent back as one's own.
        facts: both sides' challenges, and what was said of the newcomer.
    """
    return hmac.new(key, json.dumps([side, *facts]).encode(), "sha256").hexdigest()


def is_proof(proof: Any, key: bytes, side: str, *facts: Any) -> bool:
    """Whether `proof`, from a stranger, is what `prove` gives."""
    right = prove(key, side, *facts).encode()
    return isinstance(proof, str) and hmac.compare_digest(proof.encode(), right)
