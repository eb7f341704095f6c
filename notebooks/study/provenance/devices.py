"""Where a run computes: device, threads, precision, and the processes that share it.

`in_processes` starts a function in several processes with accelerate's launcher, one per GPU. Every
process takes its share of each batch. Draws, scoring and evaluation are equal in one process and in
two. Training averages the gradients of the processes, each of which has the loss of its own share:
another computation where a loss pools the batch, as the soft Jaccard loss does.
"""

import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from torch import nn

from lsgs_core.errors import InputError, check_count
from lsgs_core.randomness import Stage, generator

Precision = Literal["float32", "bfloat16"]


def make_deterministic(threads: int) -> None:
    """Fix what PyTorch leaves open: the number of CPU threads and the choice of kernels.

    One and two threads differ after some steps, so the number is a parameter that is recorded.
    """
    torch.set_num_threads(threads)
    # On a GPU, cuDNN would round the factors of convolutions to ten bits (TF32), which changes D by
    # more than another processor may, and cuBLAS repeats its sums with this workspace alone.
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Only a warning, since some CUDA backward passes (3-D resizing) have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would also fill every new tensor with NaN first, to show who reads memory before writing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_weights(seed: int, stage: Stage) -> None:
    """Seed PyTorch's generator before a network is built (pretraining) or adapted (fine-tuning)."""
    torch.manual_seed(int(generator("weights", seed, stage=stage).integers(2**63)))


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the GPU where there is one. Raises `InputError`.

    Each process of a machine gets its own GPU. GPUs are only counted here, so that processes can
    still be started afterwards.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(1, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs")
        elif "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used: {error}") from error
    return device


def is_first_process() -> bool:
    """Return True in the process that writes files and shows progress."""
    return _rank() == 0


def _rank() -> int:
    """Number of this process; a launcher says it in the environment or has set up the group."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def in_processes(
    function: Callable[..., Any], arguments: Sequence[Any], processes: int, device: str = "auto"
) -> Any:
    """Run a function in several processes, and return what it returns in the first of them.

    Every process calls it with these arguments, which reach it by a fork, and chooses its device
    itself; one process calls it here. On GPUs accelerate's `notebook_launcher` starts one process
    per GPU, and no GPU may have been used before; on a CPU `debug_launcher` starts them.
    """
    if check_count("processes", processes) == 1:
        return function(*arguments)
    from accelerate import debug_launcher, notebook_launcher  # takes seconds to import

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        call = (result, function, *arguments)
        if choose_device(device).type == "cuda":
            meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}  # at a free port
            notebook_launcher(_keep_result, call, processes, **meeting)
        else:
            debug_launcher(_keep_result, call, processes)
        return pickle.loads(result.read_bytes())  # written by our own process a moment ago


def _keep_result(result: Path, function: Callable[..., Any], *arguments: Any) -> None:
    returned = function(*arguments)
    if is_first_process():
        result.write_bytes(pickle.dumps(returned))


class Processes:
    """The processes that share a run.

    `rank` is the number of this process, from 0, and `count` is how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rank = _rank()
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=device.type == "cpu")  # the process group, once

    def gather(self, values: Any) -> list[Any]:
        """Return the values of every process, in order of rank."""
        gathered: list[Any] = [values] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(gathered, values)
        return gathered

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are averaged over the processes.

        On GPUs batch normalisation takes its statistics over all processes; on a CPU, where PyTorch
        has no such layer, over the samples of each process.
        """
        if self.count == 1:
            return module
        devices = None
        if self._device.type == "cuda":
            devices, module = [self._device.index], nn.SyncBatchNorm.convert_sync_batchnorm(module)
        # CBC has layers that its forward pass does not use.
        return nn.parallel.DistributedDataParallel(module, devices, find_unused_parameters=True)

    def whole_gradients(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a backward pass: gradients are exchanged in the last of a step."""
        if last or not isinstance(module, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return module.no_sync()
