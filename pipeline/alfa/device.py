"""Copies tensors to the device and back without waiting, so that the CPU can work ahead and keep a GPU busy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on the device. It is copied from pinned memory.

    From other memory, the copy would wait until a GPU is idle, and the GPU would then wait for its next work.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
    """Starts copying tensors of one device to the CPU. Returns a function that waits for the copies and returns them.

    It does not wait for work that is given to the device later.
    """
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
