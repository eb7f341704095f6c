"""Where a run computes: device, threads, precision, and the processes that share it.

torchrun starts a run in several processes, one per GPU or several on a CPU; so does `accelerate
launch`, on GPUs alone. The batch size stays that of the whole step: every process takes its share
of each batch, and sums over pixels, gradients and normalisation statistics are those of the whole
batch. So the result does not depend on the number of processes, but for rounding, and for dropout,
which every process draws for itself.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn

from lsgs_core.errors import InputError
from lsgs_core.randomness import Stage, generator

Precision = Literal["float32", "bfloat16"]


def make_deterministic(threads: int) -> None:
    """Fix what PyTorch leaves open: the number of CPU threads and the choice of kernels.

    One and two threads differ after some steps, so the number is a parameter that is recorded.

    Raises:
        InputError: Fewer than one thread.
    """
    if threads < 1:
        raise InputError(f"threads: expected 1 or more, found {threads}")
    torch.set_num_threads(threads)
    # Only a warning, since some CUDA backward passes (3-D resizing) have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would also fill every new tensor with NaN first, to show who reads memory before writing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_weights(seed: int, stage: Stage) -> None:
    """Seed PyTorch's generator before a network is built (pretraining) or adapted (fine-tuning)."""
    torch.manual_seed(int(generator("weights", seed, stage=stage).integers(2**63)))


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one.

    Of the processes of one machine, each gets a GPU of its own.

    Raises:
        InputError: The device is not known or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used: {error}") from error
    return device


def is_first_process() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


class Processes:
    """The processes that share a run: here a single one, which computes in float32.

    Attributes:
        rank: Of this process, from 0.
        count: How many there are.
    """

    rank = 0
    count = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        """A copy of a network that is trained in several processes runs in the same ones."""
        return self

    def mine(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of a batch's samples that this process takes, in order of rank."""
        return np.array_split(batch, self.count)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, through which gradients flow."""
        return tensor

    def gather(self, values: Any) -> list[Any]:
        """What every process has, in order of rank."""
        return [values]

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over the processes."""
        return module

    def autocast(self) -> AbstractContextManager[Any]:
        """Context in which the forward pass runs in the precision of the run."""
        return nullcontext()

    def whole_gradients(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Context of a backward pass; gradients are exchanged in the last of a step alone."""
        return nullcontext()


class LaunchedProcesses(Processes):
    """Processes started by torchrun or `accelerate launch`, or one with another precision.

    Args:
        device: Where this process computes.
        precision: Of the forward pass.
    """

    def __init__(self, device: torch.device, precision: Precision) -> None:
        from accelerate import Accelerator  # 1.5 seconds, which most runs need not wait

        # Its state is one for the whole process, so the precision is not left to it: evaluation
        # computes in float32 beside a training in bfloat16.
        self._accelerator = Accelerator(cpu=device.type == "cpu")
        self._device, self._precision = device, precision
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes

    def total(self, tensor: Tensor) -> Tensor:
        return _Sum.apply(tensor) if self.count > 1 else tensor

    def gather(self, values: Any) -> list[Any]:
        if self.count == 1:
            return [values]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, values)
        return found

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.count == 1:
            return module
        _share_batch_norm(module, self)
        device = next(module.parameters()).device
        # CBC has layers that its forward pass does not use; statistics are equal everywhere.
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=True,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        mixed = self._precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=mixed)

    def whole_gradients(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._accelerator.no_sync(module)


def processes_of(device: torch.device, precision: Precision = "float32") -> Processes:
    """The processes that share this run, as they were launched.

    Raises:
        InputError: Another precision.
    """
    if precision not in ("float32", "bfloat16"):
        raise InputError(f"precision: expected 'float32' or 'bfloat16', found {precision!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or precision != "float32":
        return LaunchedProcesses(device, precision)
    return Processes()


class _Sum(torch.autograd.Function):
    """Sum over the processes; each of them has a part in what the others make of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        whole = tensor.clone()
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole = gradient.clone()
        torch.distributed.all_reduce(whole)
        return whole


class _SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the samples of all processes.

    PyTorch's SyncBatchNorm is the same for GPUs alone.
    """

    processes: Processes

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        given = input.dtype
        input = input.to(torch.promote_types(given, torch.float32))  # sums need it
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = input.numel() / input.shape[1]
        sums = torch.stack((input.sum(axes), input.new_full((input.shape[1],), count)))
        total = self.processes.total(sums)
        samples = total[1]
        mean = total[0] / samples
        centred = input - mean.view(shape)
        variance = self.processes.total(centred.square().sum(axes)) / samples
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            rate = self.momentum
            if rate is None:  # the mean of all batches
                rate = 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach(), rate)
            self.running_var.lerp_((variance * samples / (samples - 1)).detach(), rate)
        scaled = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(given)


def _share_batch_norm(module: nn.Module, processes: Processes) -> None:
    """Let every BatchNorm layer take its statistics over all processes, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = _SharedBatchNorm
            layer.processes = processes  # type: ignore[assignment]
