"""The most a GPU can compute: dense matrix products without sparsity, as its maker's data sheet says."""

import re

import torch

TERA = 1e12
PEAK = {  # part of the device's name: (16 bits with 32-bit sums, TF32, float32), in 10^12 operations a second
    "gb200": (2500, 1250, 80),
    "b200": (2250, 1125, 75),
    "gh200": (989.4, 494.7, 66.9),
    "h200 nvl": (835.5, 417.5, 60),
    "h200": (989.4, 494.7, 66.9),
    "h100 nvl": (835.5, 417.5, 60),
    "h100 pcie": (756, 378, 51.2),
    "h100": (989.4, 494.7, 66.9),
    "a100": (312, 156, 19.5),
    "a30": (165, 82, 10.3),
    "a40": (149.7, 74.8, 37.4),
    "a10g": (70, 35, 31.5),
    "a10": (125, 62.5, 31.2),
    "l40s": (362, 183, 91.6),
    "l40": (181, 90.5, 90.5),
    "l4": (121, 60, 30.3),
    "t4": (65, None, 8.1),
    "v100-sxm2": (125, None, 15.7),
    "v100-pcie": (112, None, 14),
    "v100s": (130, None, 16.4),
    "p100": (18.7, None, 9.3),
    "rtx 6000 ada": (364.2, 182.1, 91.1),
    "rtx a6000": (154.8, 77.4, 38.7),
    "rtx 5090": (209.5, 104.8, 104.8),
    "rtx 4090": (165.2, 82.6, 82.6),
    "rtx 4080": (97.5, 48.7, 48.7),
    "rtx 3090": (71, 35.6, 35.6),
    "rtx 3080": (59.5, 29.8, 29.8),
}
OTHER = r"(?![a-z0-9]| (?:ti|super|d|laptop|max-q)\b)"  # behind a name, what makes it another card
TENSOR_CORES_FROM = 8  # compute capability that has bfloat16 and TF32


def peak_flops(name: str, precision: str, capability: int = TENSOR_CORES_FROM, tf32: bool = False) -> float | None:
    """Operations a second of one device; None for a device that is not listed, or has no such precision.

    Args:
        name: as torch.cuda.get_device_name tells. precision: Lightning's word, as bf16-mixed, 16-mixed or 32-true.
        capability: the major number of its compute capability. tf32: whether float32 products may round to TF32.
    """
    found = [key for key in PEAK if re.search(rf"(?<![a-z0-9]){re.escape(key)}{OTHER}", name.lower())]
    if not found or precision.startswith("bf16") and capability < TENSOR_CORES_FROM:
        return None
    half, tensor, single = PEAK[max(found, key=len)]
    value = half if "16" in precision else tensor if tf32 and tensor else single
    return value * TERA


def device_peak(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of this device as PyTorch is set now; None on CPU."""
    if device.type != "cuda":
        return None
    return peak_flops(
        torch.cuda.get_device_name(device),
        precision,
        torch.cuda.get_device_capability(device)[0],
        torch.get_float32_matmul_precision() != "highest",
    )
