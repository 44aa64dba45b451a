"""The certificate of HTTPS and its key, in PEM files."""
from __future__ import annotations

import os
import ssl

from blendmaskd import files


def load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Raises OSError."""
    for path in (certificate, key):
        os.close(files.open_file(path))  # OpenSSL would wait at a pipe, and the loop with it
    context.load_cert_chain(certificate, key, _no_passphrase)


def _no_passphrase() -> str:
    """OpenSSL would ask for it at the terminal, and wait."""
    raise OSError("the key has a passphrase: write it without one (openssl pkey)")
