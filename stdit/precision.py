"""The arithmetic of a model: float32, or bfloat16 where the device computes it in hardware."""

import os
import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16"]

WITHOUT_FLOAT64 = {"mps"}


def native_bf16(device: "torch.device | str" = "cpu") -> bool:
    """Whether bfloat16 products run in hardware; in software they are slower than float32."""
    import torch  # imported on use, since configs import this module without torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        in_hardware = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return in_hardware and not _cpu_limited(torch.backends.cpu.get_cpu_capability())
    return False


def _cpu_limited(kernels: str) -> bool:
    """Whether the kernels of torch or oneDNN are limited to older instructions, so that bfloat16 runs in software.

    The environment variables ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA set such limits.
    """
    if kernels in ("AVX2", "DEFAULT") and platform.machine() in ("x86_64", "AMD64"):
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return limit.upper().startswith(("SSE", "AVX2")) or limit.upper() in ("AVX", "AVX512_CORE", "AVX512_CORE_VNNI")


def wide(x: "torch.Tensor") -> "torch.Tensor":
    """`x` in float64, or in float32 on devices that have no float64 (Apple's MPS)."""
    return x.float() if x.device.type in WITHOUT_FLOAT64 else x.double()


def resolve(precision: Precision, device: "torch.device | str" = "cpu") -> Literal["fp32", "bf16"]:
    """Replace "auto" by "bf16" if the device computes it in hardware, else by "fp32"."""
    if precision == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return precision


def autocast(
    precision: Precision, device: "torch.device | str", weights: "Iterable[torch.dtype]" = ()
) -> AbstractContextManager[None]:
    """A context in which matrix products use bfloat16 if `precision` resolves to it; weights keep their data type.

    weights: data types of the weights; those in half precision are computed in it, whatever `precision` says. ValueError
    if they are in both float16 and bfloat16, which torch cannot combine.
    """
    import torch

    kind, half = torch.device(device).type, {dtype for dtype in weights if dtype != torch.float32}
    if len(half) > 1:
        found = " and ".join(sorted(str(dtype) for dtype in half))
        raise ValueError(f"parts of this model are in {found}; load all of them in one of these, or in torch.float32.")
    if resolve(precision, device) == "bf16" or half:
        return torch.autocast(kind, next(iter(half), torch.bfloat16))
    return nullcontext()
