"""A second device without hardware: tensors on "meta" that hold numbers, and refuse to meet tensors of the CPU.

Operations run on the CPU and give its numbers. What CUDA refuses is refused: an operation on tensors of two devices (a
number, which is a tensor without dimensions, may come from the CPU), and the index of one device into a tensor of the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

OTHER = torch.device("meta")
# CUDA takes these from the CPU: copies between devices, and an index on the CPU into a tensor on the device.
ACROSS = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")


class OnOther(torch.Tensor):
    """A tensor of the other device; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=OTHER,
            requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held.detach()
        return made

    def __repr__(self, **kwargs):
        return f"OnOther({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Run one operation where its tensors are."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    other = [x for x in flat if isinstance(x, OnOther)]
    cpu = [x for x in flat if not isinstance(x, OnOther) and x.ndim]
    name = func.name()
    device = kwargs.get("device")
    if (
        other
        and cpu
        and not ((name.startswith(ACROSS) and isinstance(args[0], OnOther)) or name.startswith(ACROSS[:2]))
    ):
        raise RuntimeError(f"expected all tensors to be on the same device, but {name} found meta and cpu")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args_, kwargs_ = tree_map_only(OnOther, lambda x: x.held, (args, kwargs))
    result = func(*args_, **kwargs_)
    if name == "aten::_local_scalar_dense":
        return result
    if func._schema.is_mutable and not func._schema.returns:
        return result
    if name.split(".")[0].endswith("_") and isinstance(args[0], torch.Tensor):  # in place: the tensor itself
        return args[0]
    to_other = torch.device(device).type == OTHER.type if device is not None else bool(other)
    return tree_map_only(torch.Tensor, OnOther, result) if to_other else result


class _Moved(TorchFunctionMode):
    """Makes `torch.tensor(..., device=...)`, which is no operation, on the CPU and moves it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Within it, "meta" names the device above; modules are moved by replacing their parameters."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Dispatched(), _Moved():
            yield OTHER
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})
