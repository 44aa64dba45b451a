"""With this folder on PYTHONPATH a Python process has two emulated NPUs as soon as it imports torch.

Workers get it through the settings key `worker_env`. A process that does not import torch pays nothing.
"""
import importlib.abc
import importlib.util
import sys
from pathlib import Path

EMULATION = Path(__file__).parents[1] / "emulated_npu.py"


class AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch as usual and has the emulation installed when its import is through."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_install(module):
            execute(module)
            emulation = importlib.util.spec_from_file_location("emulated_npu", EMULATION)
            sys.modules["emulated_npu"] = importlib.util.module_from_spec(emulation)
            emulation.loader.exec_module(sys.modules["emulated_npu"])
            sys.modules["emulated_npu"].install()

        spec.loader.exec_module = execute_and_install
        return spec


sys.meta_path.insert(0, AfterTorch())
