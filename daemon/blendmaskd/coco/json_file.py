"""Reading a JSON file that a person names, whatever is in it."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class JsonFileError(Exception):
    """A file that cannot be read as JSON; the text says why, without the file's name."""


def read(path: str | Path) -> Any:
    """What the file holds: UTF-8, UTF-16 or UTF-32, with or without a byte order mark. Raises `JsonFileError`.

    NaN and Infinity are taken, which Python and others write although JSON has none: who knows the fields can name the
    one that holds it.
    """
    try:
        content = Path(path).read_bytes()
        if not content.strip():
            raise JsonFileError("is empty")
        return json.loads(content)
    except OSError as error:
        raise JsonFileError(error.strerror or type(error).__name__) from None
    except UnicodeDecodeError as error:
        raise JsonFileError(f"no JSON: not {error.encoding}, byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise JsonFileError("not usable JSON: nested too deeply") from None
    except MemoryError:
        raise JsonFileError("needs more memory than is available") from None
    except ValueError as error:
        raise JsonFileError(f"no JSON: {error}") from None
