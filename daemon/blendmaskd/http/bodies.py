"""The image in a request's body: the bytes as they are, a multipart form, or JSON. Pure.

A form has the image as its field ``image``, whatever its file is called; a JSON object has it there in base64. Their
other fields are what a query may have.
"""
from __future__ import annotations

import base64
import binascii
import re
from email.message import Message
from typing import Any

import msgspec

ALLOWANCE = 64 << 10  # bytes that a body may have around its image
MOST_FIELDS = 32


class Malformed(ValueError):
    """A body that cannot be read; the text says why."""


class Body(msgspec.Struct, frozen=True):
    """An image, and what is said of it."""

    image: bytes
    fields: dict[str, Any] = {}


def largest(content_type: str, image_bytes: int) -> int:
    """How many bytes a body of this type may have for an image of so many."""
    kind, _ = parse_type(content_type)
    if kind == "application/json":
        return image_bytes // 3 * 4 + ALLOWANCE
    return image_bytes + (ALLOWANCE if kind == "multipart/form-data" else 0)


def read(content_type: str, body: bytes) -> Body:
    """Raises `Malformed`."""
    kind, parameters = parse_type(content_type)
    if kind == "application/json":
        return _from_json(body)
    if kind == "multipart/form-data":
        return _from_form(body, parameters.get("boundary", ""))
    return Body(body)


def parse_type(header: str) -> tuple[str, dict[str, str]]:
    """A media type in small letters, and its parameters."""
    message = Message()
    message["content-type"] = header
    found = message.get_params(failobj=[("", "")], unquote=True)
    texts = {name.lower(): value for name, value in found[1:] if isinstance(value, str)}  # others name an encoding
    return found[0][0].lower(), texts


def _from_json(body: bytes) -> Body:
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Malformed(f"no JSON: {error}") from None
    if not isinstance(tree, dict):
        raise Malformed("expected an object with the image in base64 as `image`")
    text = tree.pop("image", "")
    if not isinstance(text, str):
        raise Malformed("`image`: expected base64 text")
    try:
        image = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"`image` is not base64: {error}") from None
    return Body(image, tree)


def _from_form(body: bytes, boundary: str) -> Body:
    """RFC 7578, of a body that is all there."""
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():
        raise Malformed("multipart/form-data needs a boundary of 1 to 70 ASCII characters")
    mark = b"\r\n--" + boundary.encode()
    parts = (b"\r\n" + body).split(mark, MOST_FIELDS + 2)
    if len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise Malformed(f"the form does not end with its boundary, or has more than {MOST_FIELDS} fields")
    image, fields = b"", {}
    for part in parts[1:-1]:
        head, found, content = part.partition(b"\r\n\r\n")
        line = re.search(rb"(?i)\r\ncontent-disposition:([^\r\n]*)", head)
        kind, parameters = parse_type(line[1].decode("utf-8", "replace")) if line else ("", {})
        key = parameters.get("name")
        if not found or kind != "form-data" or key is None:
            raise Malformed("a field of the form has no name")
        if key in fields or (key == "image" and image):
            raise Malformed(f"the form has two fields `{key}`")
        if key == "image":
            image = content
        else:
            fields[key] = content.decode("utf-8", "replace")
    return Body(image, fields)
