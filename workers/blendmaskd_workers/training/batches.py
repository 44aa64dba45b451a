"""Which images make a batch, and loading them ahead.

Rules: the batch of an iteration depends on the data set, the seed and the iteration only, so that a training that was
interrupted goes on as if it had not been. Images of similar shape share a batch, and one size, which saves padding;
otherwise every image comes once an epoch, in a new order, except that what is left over below one batch is skipped.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blendmaskd.settings import Limits
from blendmaskd_workers.blendmask import Config, collate
from blendmaskd_workers.training.config import TrainingConfig
from blendmaskd_workers.training.dataset import LIMITS, Dataset, make_sample
from blendmaskd_workers.training.targets import GroundTruth

WINDOW = 16  # batches: within so many, images are sorted by shape
AHEAD = 3  # batches loaded ahead
THREADS = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """What one iteration learns from."""

    images: Tensor  # (N, 3, H, W) float32, channels last in memory: convolutions on a CPU are faster
    truths: list[GroundTruth]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.images.to(device), [truth.to(device) for truth in self.truths])


class Batches:
    """The batches of a training by iteration."""

    def __init__(self, dataset: Dataset, network: Config, config: TrainingConfig, seed: int,
                 limits: Limits = LIMITS) -> None:
        self.dataset = dataset
        self.network = network
        self.config = config
        self.seed = seed
        self.limits = limits  # on an image
        repeats = -(-config.batch // len(dataset.entries))  # a data set smaller than a batch fills it by repetition
        self.aspects = np.array([entry.width / entry.height for entry in dataset.entries] * repeats)
        self.per_epoch = len(self.aspects) // config.batch

    def indices(self, iteration: int) -> list[int]:
        """The positions in the data set of an iteration's images."""
        epoch, position = divmod(iteration, self.per_epoch)
        random = np.random.default_rng((self.seed, 0, epoch))
        order = random.permutation(len(self.aspects))
        span = self.config.batch * WINDOW
        batches: list[npt.NDArray[np.int64]] = []
        for window in (order[start : start + span] for start in range(0, len(order), span)):
            by_shape = window[np.argsort(self.aspects[window], kind="stable")]
            batches += np.split(by_shape, range(self.config.batch, len(by_shape) + 1, self.config.batch))[:-1]
        chosen = batches[int(random.permutation(len(batches))[position])]
        return [int(index) % len(self.dataset.entries) for index in chosen]

    def load(self, iteration: int) -> Batch:
        """Load an iteration's batch. Raises `DataError`."""
        random = np.random.default_rng((self.seed, 1, iteration))
        min_size = int(random.choice(self.config.min_sizes))
        samples = [
            make_sample(self.dataset.entries[index], self.network, self.config, min_size,
                        self.config.flip and bool(random.random() < 0.5), self.limits)
            for index in self.indices(iteration)
        ]
        images = collate([sample.prepared.tensor for sample in samples], self.network)
        return Batch(images.contiguous(memory_format=torch.channels_last), [sample.truth for sample in samples])

    def ahead(self, iterations: Sequence[int]) -> Generator[Batch, None, None]:
        """The batches of these iterations, loaded by threads a little ahead of their use. Raises `DataError`."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="load") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                for iteration in iterations:
                    waiting.append(pool.submit(self.load, iteration))
                    if len(waiting) > AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
