"""What a key of the service is. Needs no package of the extra, so that `palate keys` starts without a server.

A key is 256 random bits, shown once. What is stored is its SHA-256: nobody can try 2^256 keys, so the slow hash that a password
needs would protect nothing and cost every request.
"""

import hashlib
import re
import secrets
from typing import Literal, get_args

from palate.errors import DataError

Scoped = Literal["rank", "feedback", "users", "admin", "metrics"]
SCOPES: tuple[Scoped, ...] = get_args(Scoped)
PREFIX = "palate_"  # by which those who search code for secrets find a key that was left in it
TOKEN = re.compile(r"palate_[A-Za-z0-9_-]{43}")


def mint() -> tuple[str, bytes]:
    """A new key and what is stored of it: ("palate_" and 43 characters, its SHA-256)."""
    token = PREFIX + secrets.token_urlsafe(32)
    return token, digest(token)


def digest(token: str) -> bytes:
    """What the store keeps of a key: 32 bytes of SHA-256."""
    return hashlib.sha256(token.encode()).digest()


def scopes_of(names: str) -> tuple[Scoped, ...]:
    """The scopes of a list such as "rank,feedback". Raises `DataError` for one that does not exist, and for none."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if wrong := sorted(set(asked) - set(SCOPES)):
        raise DataError(f"the scopes {', '.join(wrong)} do not exist; expected some of {', '.join(SCOPES)}")
    if not asked:
        raise DataError(f"0 scopes: a key that may do nothing; expected some of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in asked)
