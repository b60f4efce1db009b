"""A device for machines without a GPU: as strict as CUDA about where tensors are.

It computes on the CPU. `strict` is torch's spare backend (PrivateUse1), in Python: a tensor there
wraps one of the host, so that torch sees another device, and autograd, optimizers and `Module.to`
treat it as one. Every operator runs the CPU's kernel, but first refuses what CUDA refuses: tensors
of two devices, other than numbers without a dimension and indices; and `numpy()` without `cpu()`.
`counted` counts what would make the host wait for the device. Not to be seen here: CUDA's rounding,
memory, streams, and kernels that CUDA lacks.

torch marks the hook as experimental, and the backend is registered for the whole process.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision  # noqa: F401  registers its operators
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

import lpovod

NAME = "strict"
HOOK = "_setup_privateuseone_for_python_backend"
CPU = torch.device("cpu")
PACKAGE = Path(lpovod.__file__).parent
aten = torch.ops.aten

TRANSFERS = {aten._to_copy.default, aten.copy_.default}
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
WITH_A_NUMBER = {
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.where.self,
}
ANSWERS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
"""Operators whose result is no tensor."""
WAITS = ANSWERS | {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::bincount",
    "torchvision::nms",
}
"""Operators whose result the host needs, or whose result has a size that the host needs."""
FACTORIES = (
    *("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step"),
    *("randperm", "full", "zeros", "ones", "rand", "randn", "scalar_tensor", "linspace"),
)
AUTOCAST = ("conv2d", "linear", "matmul")
"""Operators that autocast computes in bfloat16; CUDA has more."""

_waits: Counter | None = None


class MixedDevicesError(RuntimeError):
    """Tensors of the host and of the device met where CUDA does not allow it."""


class StrictTensor(torch.Tensor):
    """A tensor on the device; `host` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, host: torch.Tensor):
        self.host = host

    def __repr__(self) -> str:
        return f"Strict({self.host})"

    def __reduce_ex__(self, protocol):  # it is loaded with map_location="cpu"
        return self.host.__reduce_ex__(protocol)

    def tolist(self):
        _wait("tolist")
        return self.host.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of the device to numpy: call cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


@contextmanager
def counted() -> Iterator[Counter]:
    """Count, by kind and line of the package, what would make the host wait for the device."""
    global _waits
    _waits = Counter()
    try:
        yield _waits
    finally:
        _waits = None


def _wait(kind: str) -> None:
    if _waits is None:
        return
    frame: Any = sys._getframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents:
            _waits[kind, f"{file.relative_to(PACKAGE)}:{frame.f_lineno}"] += 1
            return
        frame = frame.f_back
    _waits[kind, "the backward pass"] += 1


def _on_device(value: Any) -> bool:
    return isinstance(value, StrictTensor)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, StrictTensor) else value


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _check(operator: Any, args: tuple, kwargs: dict) -> None:
    """Refuse tensors of two devices where CUDA does."""
    tensors = _tensors(args, kwargs)
    strangers = [t for t in tensors if not _on_device(t)]
    if not strangers or len(strangers) == len(tensors) or operator in TRANSFERS:
        return
    if operator in INDEXING and _on_device(args[0]):
        for index in _tensors(args[1]):
            if not _on_device(index):
                _wait("index to the device")
        strangers = [t for t in args[2:3] if not _on_device(t)]
    numbers = operator in WITH_A_NUMBER | INDEXING or torch.Tag.pointwise in operator.tags
    for tensor in strangers:
        if tensor.ndim or not numbers:
            shape = tuple(tensor.shape)
            raise MixedDevicesError(f"{operator}: a tensor {shape} of the host among the device's")


def _count(operator: Any, args: tuple, kwargs: dict, to_host: bool) -> None:
    """Count the waits of an operator."""
    name = operator._schema.name
    if name in WAITS:
        _wait(name.split("::")[1])
    if operator in INDEXING:
        masks = [i for i in _tensors(args[1]) if _on_device(i) and i.dtype == torch.bool]
        if masks:
            _wait("boolean index")
    if operator is aten._to_copy.default and to_host:
        _wait("to the host")
    if operator is aten.copy_.default and _on_device(args[0]) != _on_device(args[1]):
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if not asynchronous:
            _wait("to the device" if _on_device(args[0]) else "to the host")


def _run(operator: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on the CPU, with checks and counts, and wrap its results."""
    if operator is aten._has_compatible_shallow_copy_type.default:
        return False
    # In inference mode nothing has decomposed them yet.
    if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"):
        parts = operator.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    _check(operator, args, kwargs)
    to_host = False
    if kwargs.get("device") is not None:
        to_host = torch.device(kwargs["device"]) == CPU
        kwargs = kwargs | {"device": CPU}
    _count(operator, args, kwargs, to_host)
    result = operator(*tree_map(_host, args), **tree_map(_host, kwargs))
    if operator._schema.name in ANSWERS:
        return result
    given = {id(_host(t)): t for t in _tensors(args, kwargs)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:  # in place, or out=
            return given[id(value)]
        if to_host:
            return value
        # In inference mode a view of a normal tensor is a normal tensor.
        with nullcontext() if value.is_inference() else torch.inference_mode(False):
            return StrictTensor(value)

    return tree_map(wrapped, result)


def _copy_literal(source: Any, destination: Any, non_blocking: bool = False) -> Any:
    """What `torch.tensor(..., device=...)` and `new_tensor` end in."""
    _wait("to the device")
    _host(destination).copy_(_host(source))
    return destination


def _factory(name: str) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    operator = getattr(getattr(aten, base), overload or "default")
    return lambda *args, **kwargs: _run(operator, args, kwargs)


def _autocast(name: str) -> Callable[..., Any]:
    operator = getattr(aten, name).default

    def lowered(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.bfloat16() if is_float else value

    def compute(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(NAME, enabled=False):
            return operator(*tree_map(lowered, args), **tree_map(lowered, kwargs))

    return compute


def available() -> bool:
    """Whether this torch has the hook."""
    return hasattr(backend_registration, HOOK)


def register() -> str:
    """Make the device known to torch, once in a process; returns its name."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        getattr(backend_registration, HOOK)(NAME)
        library = torch.library.Library("aten", "IMPL")
        for name in FACTORIES:
            library.impl(name, _factory(name), "PrivateUse1")
        library.impl("_copy_from", _copy_literal, "PrivateUse1")
        for name in AUTOCAST:
            library.impl(name, _autocast(name), "AutocastPrivateUse1")
        others = torch.library.Library("_", "IMPL")
        others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        # They live as long as the process.
        register.libraries = library, others  # type: ignore[attr-defined]
        module: Any = getattr(torch, NAME, None) or ModuleType(NAME)
        module.get_amp_supported_dtype = lambda: [torch.bfloat16]
        setattr(torch, NAME, module)
    return NAME
