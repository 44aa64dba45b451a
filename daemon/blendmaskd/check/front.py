"""Whether the HTTP front, `blendmaskd-http`, can listen where it is to, and who may ask it."""
from __future__ import annotations

import importlib.util
import os
import ssl

import msgspec

from blendmaskd.check.endpoints import EndpointFacts, ask_http, judge
from blendmaskd.check.finding import Finding, error, ok, warning
from blendmaskd.http.certificate import load
from blendmaskd.http.tokens import Tokens, TokensError
from blendmaskd.settings import Settings
from blendmaskd.shell.addresses import is_loopback


class FrontFacts(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: EndpointFacts
    local: bool  # it listens on a loopback address
    insecure: bool = False
    tokens: int | None = None  # how many there are; None: there is no file of them, or it is not for this user
    hidden: bool = False  # only the front's user may read the tokens
    tokens_problem: str = ""
    encrypted: bool = False
    certificate_problem: str = ""


def ask(settings: Settings) -> FrontFacts | None:
    """None where this installation has no front."""
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
        return None
    http = settings.http
    number, hidden, problem = _tokens(http.tokens)
    return FrontFacts(
        endpoint=ask_http(settings), local=is_loopback(http.endpoint), insecure=http.insecure, tokens=number,
        hidden=hidden, tokens_problem=problem, encrypted=bool(http.certificate),
        certificate_problem=_certificate(http.certificate, http.key),
    )  # fmt: skip


def _tokens(path: str | None) -> tuple[int | None, bool, str]:
    if not path:
        return None, False, ""
    if os.path.exists(path) and not os.access(path, os.R_OK):
        return None, True, ""
    try:
        return len(Tokens(path).names), False, ""
    except TokensError as problem:
        return None, False, str(problem)


def _certificate(certificate: str | None, key: str | None) -> str:
    if not certificate or not key or (os.path.exists(key) and not os.access(key, os.R_OK)):
        return ""
    try:
        load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key)
    except OSError as problem:
        return f"{certificate}, {key}: {problem.strerror or problem}"
    return ""


def judge_front(facts: FrontFacts) -> list[Finding]:
    # The daemon serves all the same: where nobody starts a front, nothing is wrong.
    levels = {"error": "warning"}
    found = [msgspec.structs.replace(each, area="http", level=levels.get(each.level, each.level))
             for each in judge(facts.endpoint)]  # fmt: skip
    if facts.tokens_problem:
        found.append(error("http", f"http.tokens: {facts.tokens_problem}", "docs/http.md#who-may-ask"))
    elif facts.tokens == 0:
        found.append(warning("http", "http.tokens: no token in the file: nobody may ask", "docs/http.md#who-may-ask"))
    elif facts.tokens or facts.hidden:
        who = f"{facts.tokens} clients" if facts.tokens else "those in a file that is the front's alone"
        found.append(ok("http", f"http.tokens: {who} may ask"))
    elif not facts.local and not facts.insecure:
        found.append(error("http", f"http.endpoint: {facts.endpoint.endpoint}: open to others, and without tokens",
                           "name a file of tokens as http.tokens"))  # fmt: skip
    elif not facts.local:
        found.append(warning("http", "http.insecure: anyone who can reach the port can submit images",
                             "name a file of tokens as http.tokens"))  # fmt: skip
    if facts.certificate_problem:
        found.append(error("http", f"http.certificate: {facts.certificate_problem}", "name a PEM file and its key"))
    elif not facts.local and not facts.encrypted:
        found.append(warning("http", "images and tokens travel unencrypted", "set http.certificate and http.key"))
    return found
