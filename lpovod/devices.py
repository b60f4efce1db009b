"""Devices: one that exists, a card of a job's own, and what to change if its memory is too small.

Snakemake starts as many jobs as `--resources gpu=N` allows and does not say which card is whose;
SLURM does, by CUDA_VISIBLE_DEVICES. Where nobody did, a job locks a card and shows itself that card
alone. Locks end with the process, however that ends.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from lpovod.exceptions import LpovodError, lack_of_memory
from lpovod.progress import log

VISIBLE = "CUDA_VISIBLE_DEVICES"


def usable_cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone knows the cores of a job
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_gpu() -> None:
    """Refuse a machine without a GPU.

    Raises:
        LpovodError: if torch sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise LpovodError(
            "gpu: true, and torch sees no GPU on this machine (nvidia-smi shows what the driver "
            "sees): set gpu: false, or run on a machine that has one"
        )


def device_of(device: str | None) -> str:
    """A device that torch has; None for the GPU if there is one, otherwise the CPU.

    Raises:
        LpovodError: if there is no such device.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return "cuda" if gpus else "cpu"
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    if device in known or (not device.startswith("cuda") and _can_hold_a_tensor(device)):
        return device
    fault = f"device {device!r}: this machine has {', '.join(known)}"
    if gpus and device.startswith("cuda"):
        raise LpovodError(f"{fault}. Lower training_gpus to the number of its GPUs")
    raise LpovodError(
        f"{fault}; nvidia-smi shows the GPUs that the driver sees, and {VISIBLE} may hide them. "
        "Set gpu: false, or give the device cpu"
    )


def _can_hold_a_tensor(device: str) -> bool:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def own_device(device: str | None) -> str:
    """The device of a job or a program, found to exist; on "cuda" a card of its own.

    To be called before anything that takes long, and before CUDA is used. A library calls
    `device_of`: which cards its process sees is not its to decide.

    Args:
        device: as for `device_of`.

    Raises:
        LpovodError: if there is no such device.
    """
    if device in ("cuda", None):
        see_own_cards(1)
    return device_of(device)


def see_own_cards(number: int) -> None:
    """Lock cards, and hide all others from this process and from those that it starts.

    Does nothing if CUDA_VISIBLE_DEVICES is set, or if the machine has fewer cards.
    """
    if VISIBLE in os.environ:
        return
    import torch

    cards = torch.cuda.device_count()  # asks the driver's library: no card is initialised
    if cards >= number:
        os.environ[VISIBLE] = ",".join(map(str, lock_cards(number, cards)))


def lock_cards(number: int, cards: int, folder: Path | None = None) -> list[int]:
    """Numbers of different cards, of those with the fewest jobs; locked until this process ends.

    A program that this process becomes (`os.exec`) keeps the locks.

    Args:
        number: of cards to lock, at most `cards`.
        cards: that the machine has.
        folder: of the locks, one for the whole machine; None for the temporary files' folder.
    """
    folder = folder or Path(tempfile.gettempdir())
    locked: list[int] = []
    for jobs in count():  # of others on the card: nobody waits, for some run two on a large card
        for card in range(cards):
            if card not in locked and _lock(folder / f"lpovod-gpu-{card}-{jobs}.lock"):
                locked.append(card)
                log.info(f"GPU {card} of {cards}" + f", beside {jobs} other jobs" * bool(jobs))
                if len(locked) == number:
                    return sorted(locked)
    raise AssertionError("unreachable")


def _lock(path: Path) -> bool:
    """Whether no other process holds the lock; it is this one's then."""
    try:
        descriptor = _open_for_all(path)
        os.set_inheritable(descriptor, True)
    except OSError as error:
        log.warning(f"{path} cannot be locked ({error}): another job may use the same GPU")
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


def _open_for_all(path: Path) -> int:
    """A descriptor of a file that every user can open, which is made if it does not exist."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:  # without O_CREAT, which Linux refuses for other users' files in /tmp
        return os.open(path, os.O_RDONLY)
    os.fchmod(descriptor, 0o644)  # whatever the umask
    return descriptor


@contextmanager
def explaining_memory(keys: str) -> Iterator[None]:
    """End a lack of memory in the block, of the host or of a GPU, with the keys to lower.

    Args:
        keys: of the configuration, or arguments of the caller: "region_features.batch_size".

    Raises:
        LpovodError: in place of torch's OutOfMemoryError and of MemoryError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (reason := lack_of_memory(error)) is None:
            raise
        raise LpovodError(f"not enough memory: {reason}\nLower {keys}") from None
