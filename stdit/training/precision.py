"""Which arithmetic a machine does natively."""

import torch


def native_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 products run in hardware; in software they are slower than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False) or torch.cpu.get_capabilities().get("amx_bf16", False)
