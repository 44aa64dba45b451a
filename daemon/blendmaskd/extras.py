"""What an installation lacks: a module that is not there becomes one line that names the extra to install.

``pip install blendmaskd`` installs a client, and programs around one, for any platform. What serves and computes is in
the extra ``serve``. A program imports what it needs and is none the wiser; `run` is around it.
"""
from __future__ import annotations

import importlib
import sys

from blendmaskd import output

EXTRAS = {
    "torch_npu": "npu", "matplotlib": "plots", "onnx": "onnx", "onnxruntime": "onnx", "ray": "ray", "pyarrow": "ray",
    "starlette": "http", "uvicorn": "http", "opentelemetry": "otel",
}  # fmt: skip  # else the program's own
EXIT_LACKING = 2  # as for wrong arguments


def run(name: str, module: str, code: int = EXIT_LACKING, extra: str = "serve") -> int:
    """Run the `main` of a module; `code` is the exit code where the installation lacks what it needs of `extra`."""
    output.print_anything()
    try:
        ended: int = importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        output.complain(f"{name}: {lacking(error, extra)}")
        return code
    except SystemExit as end:  # --help, or wrong arguments
        raise SystemExit(output.complete(name, end.code) if isinstance(end.code, int) else end.code) from None
    except KeyboardInterrupt:  # as libraries are loaded, say
        return output.EXIT_INTERRUPTED
    return output.complete(name, ended)


def lacking(error: ModuleNotFoundError, extra: str = "serve") -> str:
    """What to install, or that this platform will not do. Raises the error again if the module is one of ours."""
    missing = (error.name or "").partition(".")[0]
    if missing in ("", "blendmaskd", "blendmaskd_workers"):
        raise error
    if missing in sys.stdlib_module_names:
        return f"needs Linux: Python has no module {missing} on {sys.platform}"
    extra = EXTRAS.get(missing, extra)
    return f"{missing} is not installed; it comes with the extra: pip install 'blendmaskd[{extra}]'"
