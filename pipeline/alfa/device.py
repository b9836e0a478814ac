"""Tensors to the device and back, without either waiting for the other: a GPU is kept busy by who works ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on the device. From memory that is not pinned, the copy would wait for what a GPU is busy
    with, and the GPU would then wait for what comes next."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
    """Tensors of one device, copied to the CPU as soon as it has them. The call waits for that, but not for what the
    device is asked for later."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # on a GPU, to pinned memory
    done = None
    if tensors[0].device.type == "cuda":
        done = torch.cuda.Event()
        done.record()

    def wait() -> list[NDArray[Any]]:
        if done is not None:
            done.synchronize()
        return [copy.numpy() for copy in copies]

    return wait
