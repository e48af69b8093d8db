"""Pictures through PyTorch's DataLoader: worker processes decode the next batches meanwhile.

For data sets that neither memory nor the device holds. It works under every backend: the workers
are processes of their own that know no backend, and the order is the one they are given, so that
the same batches come out as without it.
"""

import os
import shutil
import sys

import numpy as np
import torch

SHARED_MEMORY = "/dev/shm"  # workers hand their batches over in it; Docker makes it 64 MB


class SharedMemoryError(Exception):
    """There is too little of it; the message is one line: expected, got, remedy."""

    ending = ("error", 2)  # status and exit code


class Splits(torch.utils.data.Dataset):
    """Several arrays of images, numbered through, of which whole batches are asked for."""

    def __init__(self, splits):
        self.splits = splits
        self.firsts = np.cumsum([0, *map(len, splits)])

    def __getitems__(self, index):
        split = np.searchsorted(self.firsts, index[0], "right") - 1  # a batch is of one split
        try:
            return torch.from_numpy(self.splits[split][np.array(index) - self.firsts[split]])
        except Exception as error:
            if hasattr(error, "ending"):  # no surprise: told as it is, without a worker's traceback
                return error
            raise


class Loader:
    """One DataLoader, so one set of workers, for all splits of a data set.

    Args:
        splits: arrays uint8 (n, height, width, channels), or what can be indexed like them and be
            pickled; each worker gets a copy.
        batch_size: images at once.
        workers: processes; with 0 this one does the work.
        prefetch: batches that each worker makes in advance.
        pin: whether batches lie in page-locked memory: their way to a GPU keeps nobody waiting.

    Raises:
        SharedMemoryError.
    """

    def __init__(self, splits, batch_size, workers, prefetch, pin):
        batch_bytes = batch_size * int(np.prod(splits[0].shape[1:]))
        needed, folder = (workers * prefetch + 2) * batch_bytes, SHARED_MEMORY
        if workers and os.path.isdir(folder) and shutil.disk_usage(folder).free < needed:
            raise SharedMemoryError(
                f"--loader-workers {workers}: expected {needed / 1e6:.0f} MB of shared memory in "
                f"{folder}, got {shutil.disk_usage(folder).free / 1e6:.0f}: docker run --ipc host, "
                "or fewer workers"
            )
        self.batch_size, self.indices = batch_size, []
        self.loader = torch.utils.data.DataLoader(
            Splits(splits),
            batch_sampler=self.indices,  # filled anew for each pass
            collate_fn=return_batch,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            # Not forked: JAX has threads, whose locks a fork would copy as they are.
            multiprocessing_context="spawn" if workers else None,
            pin_memory=pin,
        )
        firsts = self.loader.dataset.firsts
        self.streams = [Stream(self, images, first) for images, first in zip(splits, firsts)]

    def load(self, index):
        """Batches of images, uint8 tensors, in the order of `index` (n,); the last may be less."""
        size = self.batch_size
        self.indices[:] = [index[i : i + size].tolist() for i in range(0, len(index), size)]
        # Spawned processes import the main module first: here Keras and a backend, for nothing.
        main = vars(sys.modules["__main__"])
        path = main.pop("__file__", None)
        try:
            batches = iter(self.loader)
        finally:
            if path is not None:
                main["__file__"] = path
        return map(raise_error, batches)


class Stream:
    """One of a loader's splits: what it is made of, and batches by the workers."""

    def __init__(self, loader, images, first):
        self.loader, self.images, self.first = loader, images, int(first)
        self.shape, self.counts = images.shape, getattr(images, "counts", None)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]

    def batches(self, order):
        """Batches of the loader's size, uint8 tensors, in an order, int (n,), of indices."""
        return self.loader.load(self.first + order)


def return_batch(batch):
    """What a DataLoader has to do to make a batch of a batch; by name, for the workers."""
    return batch


def raise_error(batch):
    if isinstance(batch, Exception):
        raise batch
    return batch
