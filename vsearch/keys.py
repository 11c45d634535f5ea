"""API keys of the query service: a JSON file of names, each with the SHA-256 of its key.

A key is 32 random bytes. Nobody can try so many, so a plain hash of it gives nothing away; the slow
hashes that passwords need would only make every request slow.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vsearch.config import UserError

KEY_BYTES = 32
LONGEST_KEY = 256
"""What is longer in characters is none of ours; it need not even be hashed."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")


class Keys:
    """The keys that are accepted; of each only its SHA-256 is known."""

    def __init__(self, digests: dict[str, str]) -> None:
        self._digests = {name: bytes.fromhex(digest) for name, digest in digests.items()}

    @classmethod
    def load(cls, path: str | Path) -> "Keys":
        """The keys of a file, of which there may be none. Raises `UserError` if it cannot be used."""
        return cls(_read(Path(path)))

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, key: str) -> str | None:
        """The name of a key, None if it is not accepted. How long this takes depends neither on the
        names nor on how much of a key is right.
        """
        if len(key) > LONGEST_KEY:
            return None
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def add_key(path: str | Path, name: str, replace: bool = False) -> str:
    """Makes a key, adds its SHA-256 to the file, which is made if there is none, and gives the key:
    it cannot be had again. Raises `UserError` for a name that is taken, unless it is to be replaced.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a key: use at most 64 letters, digits, dots, hyphens, underscores "
            f"and @, and begin with a letter or digit."
        )
    key = f"vs_{secrets.token_urlsafe(KEY_BYTES)}"
    with _changed(Path(path)) as digests:
        if name in digests and not replace:
            raise UserError(
                f"{path} has a key named {name!r} already: choose another name, or --replace it."
            )
        digests[name] = hashlib.sha256(key.encode()).hexdigest()
    return key


def remove_key(path: str | Path, name: str) -> None:
    """Takes a key out of the file. Raises `UserError` if it has none of that name."""
    with _changed(Path(path)) as digests:
        if name not in digests:
            raise UserError(f"{path} has no key named {name!r}.")
        del digests[name]


@contextmanager
def _changed(path: Path) -> Iterator[dict[str, str]]:
    """The digests by name, to be changed: they are written when the block ends without an error. The
    new file is also the lock, so of two that change one file at once none loses what it wrote.
    """
    path = path.resolve()  # what a link leads to is replaced, not the link
    new = path.with_name(f"{path.name}.new")
    try:
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(
            f"{path} is being changed by another command; if there is none, delete {new}."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        with open(handle, "w", encoding="utf-8") as file:
            digests = _read(path) if path.exists() else {}
            yield digests
            file.write(json.dumps(digests, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"The keys in {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The keys in {path} cannot be read: it is no JSON.") from error
    if not isinstance(found, dict) or not all(
        isinstance(digest, str) and DIGEST.fullmatch(digest) for digest in found.values()
    ):
        raise UserError(
            f"The keys in {path} cannot be read: a JSON object is expected, with the SHA-256 (64 "
            f"hexadecimal digits) of each key under its name; 'vsearch key NAME' writes it."
        )
    return found
