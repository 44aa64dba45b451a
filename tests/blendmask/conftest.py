"""The small network with its reproducible weights, and the golden files."""


import numpy as np
import pytest
import torch
from PIL import Image

from blendmaskd_workers.blendmask import BlendMask, Config, build, load_config, load_into, random_weights
from checkout import ROOT

GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # two test processes share the cores; what must sum as it was recorded takes `two_threads`


@pytest.fixture(scope="session")
def small_config() -> Config:
    return load_config(GOLDEN / "small_R18.yaml")


@pytest.fixture(scope="session")
def small_model(small_config) -> BlendMask:
    model = build(small_config)
    load_into(model, random_weights(model))
    return model


@pytest.fixture(scope="session")
def photograph():
    """Return a function from a file name to the BGR pixels (H, W, 3)."""
    return lambda name: np.asarray(Image.open(GOLDEN / "images" / name).convert("RGB"))[:, :, ::-1]
