"""Which arithmetic a machine does natively, and a context that uses it."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16"]


def native_bf16(device: "torch.device | str" = "cpu") -> bool:
    """Whether bfloat16 products run in hardware; in software they are slower than float32."""
    import torch  # on use: configs import this module and no torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def resolve(precision: Precision, device: "torch.device | str" = "cpu") -> Literal["fp32", "bf16"]:
    """`auto` becomes what the device does natively."""
    if precision == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return precision


def autocast(precision: Precision, device: "torch.device | str") -> AbstractContextManager[None]:
    """Products in bfloat16 where `precision` says so; weights stay as they are."""
    import torch

    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if resolve(precision, device) == "bf16" else nullcontext()
