"""A GPU that is not there: tensors that claim to be on ``cuda:0`` and keep their numbers on the CPU.

What would make the host wait for a GPU is noted by where it happens, and what a GPU would refuse (tensors of two
devices in one operation) is refused. So a CPU can tell whether a step waits, and whether all of it is on one device.
Derivatives are random numbers: autograd's engine would look for the device itself.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from flops_lightning.noise import philox

CUDA = torch.device("cuda", 0)
NUMBERS = {"_local_scalar_dense", "is_nonzero", "equal"}
WAITING = NUMBERS | {"nonzero", "masked_select", "bincount", "unique_dim", "_unique2", "unique_consecutive"}
"""Operations that give the host a number, or whose result's shape the device alone knows; there are more below."""
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
_noted: list[str] = []


def note(what: str) -> None:
    """Remember a wait by the innermost function outside of torch and of this file."""
    frame: Any = sys._getframe(1)
    while frame.f_globals["__name__"].split(".")[0] == "torch" or frame.f_globals["__name__"] == __name__:
        frame = frame.f_back
    module = frame.f_globals["__name__"].removeprefix("flops_lightning.")
    _noted.append(f"{module}.{frame.f_code.co_name}: {what}")


def noted() -> Counter[str]:
    """What has waited since this was asked last, by place."""
    found = Counter(_noted)
    _noted.clear()
    return found


def on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class PretendedTensor(Tensor):
    """The numbers of a CPU tensor under the name of another device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendedTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA, requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.held = inner.detach()

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on a GPU that is not there"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            return (_moved if name == "_to_copy" else _copied)(func, args, kwargs)
        _look(func, name, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        leaves, form = tree_flatten((args, kwargs))
        own_args, own_kwargs = tree_unflatten([getattr(leaf, "held", leaf) for leaf in leaves], form)
        out = func(*own_args, **own_kwargs)
        if name in NUMBERS:
            return out
        wrapped = tree_map_only(Tensor, lambda t: t if isinstance(t, PretendedTensor) else PretendedTensor(t), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _look(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Note an operation that waits; refuse one on two devices."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    strangers = [t for t in tensors if not isinstance(t, PretendedTensor) and t.dim()]
    if name in WAITING or (name in INDEXING and _by_mask(name, args)):
        note(name)
    if strangers and name in INDEXING:
        note("index from the host")
    elif strangers:
        raise RuntimeError(f"{func}: expected all tensors on {CUDA}, found {[t.shape for t in strangers]} on the CPU")


def _by_mask(name: str, args: Any) -> bool:
    masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
    filled = name.startswith("index_put") and len(masks) == 1 and args[2].numel() == 1  # torch fills without a look
    return bool(masks) and not filled


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    source, device = args[0], kwargs.pop("device", None)
    here = isinstance(source, PretendedTensor)
    there = here if device is None else on_gpu(device)
    for name in ("non_blocking", "pin_memory"):
        kwargs.pop(name, None)
    if here and not there:
        note("to the host")
    moved = func(getattr(source, "held", source), **kwargs)
    return PretendedTensor(moved) if there else moved


def _copied(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    target, source = args[:2]
    if isinstance(target, PretendedTensor) != isinstance(source, PretendedTensor):
        note("copy_ between devices")
    func(getattr(target, "held", target), getattr(source, "held", source), *args[2:], **kwargs)
    return target


class PretendedFactories(TorchDispatchMode):
    """Tensors that torch itself makes on ``cuda`` are pretended ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = any(isinstance(each, PretendedTensor) for each in tree_flatten((args, kwargs))[0])
        if given or not on_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        if func.overloadpacket.__name__ == "_to_copy":
            return _moved(func, args, kwargs)
        return PretendedTensor(func(*args, **{**kwargs, "device": torch.device("cpu")}))


class PretendedDevice(TorchFunctionMode):
    """The same for those that are asked for by name: there torch would look for a driver before any dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        if func is Tensor.pin_memory:
            pinned = first.clone()
            pinned.in_pinned_memory = True
            return pinned
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _to(func, first, args[1:], kwargs)
        if func is torch.autograd.grad and isinstance(tree_flatten(args[1])[0][0], PretendedTensor):
            return tuple(PretendedTensor(torch.randn(p.shape, dtype=p.dtype)) for p in tree_flatten(args[1])[0])
        if isinstance(first, PretendedTensor):
            return _of_tensor(func, args, kwargs)
        if on_gpu(kwargs.get("device")):
            if func in (torch.tensor, torch.as_tensor):
                note("a tensor made of numbers")
            return PretendedTensor(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _of_tensor(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    first = args[0]
    if func is Tensor.tolist:
        note("tolist")
        return first.held.tolist()
    if func is Tensor.new_tensor:
        note("a tensor made of numbers")
        return PretendedTensor(first.held.new_tensor(*args[1:], **kwargs))
    if func is Tensor.__getitem__ and isinstance(args[1], list):
        note("index from the host")
        args = first, PretendedTensor(torch.tensor(args[1]))
    if on_gpu(kwargs.get("device")):
        kwargs.pop("device")  # where the tensor is
    return func(*args, **kwargs)


def _to(func: Any, tensor: Tensor, rest: Any, kwargs: dict[str, Any]) -> Tensor:
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    device = {Tensor.cpu: "cpu", Tensor.cuda: CUDA}.get(func, device)
    for each in rest:
        if isinstance(each, Tensor):
            device, dtype = each.device, each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, (str, torch.device)):
            device = each
    dtype = dtype or tensor.dtype
    here = isinstance(tensor, PretendedTensor)
    there = here if device is None else on_gpu(device)
    if here == there:
        return tensor.to(dtype, copy=kwargs.get("copy", False)) if dtype != tensor.dtype or "copy" in kwargs else tensor
    if here:
        note("to the host")
        return tensor.held.to(dtype)
    if not (kwargs.get("non_blocking") and hasattr(tensor, "in_pinned_memory")):
        note("from pageable memory")
    return PretendedTensor(tensor.detach().to(dtype).clone())


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """``cuda`` is a device while the context lasts; ``module.to("cuda")`` and the like work."""
    torch._C._ensureCUDADeviceGuardSet()  # as torch's FakeTensorMode does: a guard that looks for no driver
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot change its class
    try:
        with PretendedDevice(), PretendedFactories():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class PretendedKernels:
    """What ``noise/philox_triton.py`` computes, in torch's arithmetic."""

    @staticmethod
    def draw(keys: Tensor, size: int, *, signs: bool = False, stream: int = 0) -> Tensor:
        return (philox.signs if signs else philox.normals)(keys, size, torch.float32, stream)

    @classmethod
    def draw_and_add(
        cls, h: Tensor, index: Tensor, keys: Tensor, *, sigma: float, tokens: slice | None = None,
        relative: Tensor | None = None, unit: int = 1, signs: bool = False,
    ) -> Tensor:  # fmt: skip
        rows = h.index_select(0, index)
        moved = rows if tokens is None else rows[:, tokens]
        z = cls.draw(keys, moved[0].numel(), signs=signs).view(-1, *moved.shape[1:])
        z = torch.stack((z, -z), 1).flatten(0, 1) if unit == 2 else z
        moved += (sigma * z * (1.0 if relative is None else relative[:, None])).to(h.dtype)
        return rows

    @classmethod
    def draw_and_accumulate(
        cls, keys: Tensor, bounds: Tensor, shape: tuple[int, ...], *, total: Tensor | None = None,
        weights: Tensor | None = None, square_weights: Tensor | None = None, relative: Tensor | None = None,
        signs: bool = False,
    ) -> Tensor | None:  # fmt: skip
        z = cls.draw(keys, torch.Size(shape).numel(), signs=signs).view(-1, *shape)
        z = z if relative is None else z / relative[:, None]
        sample = torch.searchsorted(bounds[1:], torch.arange(len(keys), device=keys.device), right=True)
        column = (-1, *(1,) * len(shape))
        if total is not None and weights is not None:
            total.index_add_(0, sample, weights.view(column) * z)
        if square_weights is None:
            return None
        squares = torch.zeros((len(bounds) - 1, *shape), device=keys.device)
        return squares.index_add_(0, sample, square_weights.view(column) * z.square())
