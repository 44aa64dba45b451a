"""Pages of one file, which fetch nothing from elsewhere: their policy (CSP) knows script and style by hash."""
from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources


def page(package: str, name: str) -> tuple[bytes, str]:
    """A page that lies in a package, and its policy: it may connect to its own origin."""
    text = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    return text.encode(), policy(text)


def policy(text: str) -> str:
    return (
        f"default-src 'none'; script-src {_hash(text, 'script')}; style-src {_hash(text, 'style')};"
        " connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(page: str, element: str) -> str:
    """What CSP knows the page's one such element by, or that it has none."""
    found = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    if not found:
        return "'none'"
    (inside,) = found
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
