"""The console commands of the base installation, and how any command says what its installation lacks.

``pip install blendmaskd`` installs a client, and programs around one, for any platform. What serves and computes is in
the extra ``serve``. A program imports what it needs and is none the wiser: here, around it, a module that is not there
becomes one line that names the extra.
"""
from __future__ import annotations

import importlib
import sys
from functools import partial

from blendmaskd.core.supervisor import EXIT_CANNOT_BOOT

EXTRAS = {"torch_npu": "npu", "matplotlib": "plots", "ray": "ray", "pyarrow": "ray", "starlette": "ray"}  # else serve
EXIT_USAGE = 2


def run(name: str, module: str, code: int = EXIT_USAGE) -> int:
    """Run the `main` of a module; `code` is the exit code where the installation lacks what it needs."""
    try:
        ended: int = importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        print(f"{name}: {lacking(error)}", file=sys.stderr)
        return code
    return ended


def lacking(error: ModuleNotFoundError) -> str:
    """What to install, or that this platform will not do. Raises the error again if the module is one of ours."""
    missing = (error.name or "").partition(".")[0]
    if missing in ("", "blendmaskd", "blendmaskd_workers"):
        raise error
    if missing in sys.stdlib_module_names:
        return f"needs Linux: Python has no module {missing} on {sys.platform}"
    extra = EXTRAS.get(missing, "serve")
    return f"{missing} is not installed; it comes with the extra: pip install 'blendmaskd[{extra}]'"


serve = partial(run, "blendmaskd", "blendmaskd.__main__", EXIT_CANNOT_BOOT)
submit = partial(run, "blendmaskd-submit", "blendmaskd.programs.submit")
stats = partial(run, "blendmaskd-stats", "blendmaskd.programs.show_stats")
keys = partial(run, "blendmaskd-keys", "blendmaskd.keys")
evaluate_coco = partial(run, "blendmaskd-evaluate-coco", "blendmaskd.programs.evaluate_coco")
