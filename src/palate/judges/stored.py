"""Answers on disk, one file each, found by the hash of everything that changes an answer: `Stored`.

    DIR/3f/3fa4...json    {"request": {...}, "reply": {...}}

The request stands beside the reply so that a person can read what was asked. A file is written whole under another name and then
renamed: a process killed at any moment leaves either the answer or nothing.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELDS = {"text": str, "prompt_tokens": int | None, "completion_tokens": int | None, "finish_reason": str | None}


class Stored:
    """Answers in a folder, for any number of threads and processes at once.

    Args:
        folder: made when the first answer is kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, key: str) -> dict[str, Any] | None:
        """The answer under a key; None where there is none, or where the file was damaged, so that it is asked for again."""
        try:
            reply = json.loads(self._path(key).read_text(encoding="utf-8"))["reply"]
        except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError):
            return None
        if not isinstance(reply, dict) or set(reply) != set(FIELDS):
            return None
        return reply if all(isinstance(reply[name], kind) for name, kind in FIELDS.items()) else None

    def write(self, key: str, reply: Mapping[str, Any], request: Mapping[str, Any]) -> None:
        """Keep an answer. Raises `OSError` where the disk is full or the folder cannot be written."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{key}.{os.getpid()}-{threading.get_ident()}.partial")
        partial.write_text(json.dumps({"request": dict(request), "reply": dict(reply)}, indent=1), encoding="utf-8")
        partial.replace(path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
