"""BlendMask instance segmentation from every accelerator of a host: the client, and the daemon that it talks to.

    from blendmaskd import Client

    with Client("ipc:///run/blendmaskd/client.sock") as client:
        print(client.segment("photo.jpg").detections)

The names below are the client's; `blendmaskd.client.blocking` describes them. Each is loaded when it is first asked
for, so that ``import blendmaskd`` alone loads no library. Nothing here imports torch.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blendmaskd.client.asynchronous import AsyncClient
    from blendmaskd.client.blocking import Client
    from blendmaskd.client.connection import DEFAULT_ENDPOINT, HandshakeError
    from blendmaskd.client.exchange import Image, JobFailed, Segmentation, ServerPath, SharedMemoryError
    from blendmaskd.keys import KeyFileError
    from blendmaskd.protocol import Code
else:  # type checkers read the imports above instead, and so notice a misspelt name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from blendmaskd.client import blocking

        return getattr(blocking, name)


__all__ = [
    "DEFAULT_ENDPOINT", "AsyncClient", "Client", "Code", "HandshakeError", "Image", "JobFailed", "KeyFileError",
    "Segmentation", "ServerPath", "SharedMemoryError",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
