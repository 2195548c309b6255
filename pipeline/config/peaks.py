"""What devices can do at most, and which of them a name means."""

from __future__ import annotations

import re

# Peak 10^12 FLOP/s of dense matrix products (makers' data sheets; bf16 summed in fp32, fp32 without
# TF32; of a form factor that the name does not tell, SXM).
PEAKS = {
    "a100": {"bf16": 312.0, "fp32": 19.5},
    "h100": {"bf16": 989.4, "fp32": 66.9},
    "b200": {"bf16": 2250.0, "fp32": 75.0},
    "h200": {"bf16": 989.4, "fp32": 66.9},
    "h100-pcie": {"bf16": 756.0, "fp32": 51.0},
    "h100-nvl": {"bf16": 835.0, "fp32": 60.0},
    "a40": {"bf16": 149.7, "fp32": 37.4},
    "a30": {"bf16": 165.0, "fp32": 10.3},
    "l40s": {"bf16": 362.0, "fp32": 91.6},
    "l40": {"bf16": 181.0, "fp32": 90.5},
    "l4": {"bf16": 121.0, "fp32": 30.3},
    "rtx4090": {"bf16": 165.2, "fp32": 82.6},
    "rtx3090": {"bf16": 71.0, "fp32": 35.6},
}
# Their memory in 10^9 bytes (the same sheets; of an A100 the larger).
MEMORY = {
    "a100": 80.0,
    "h100": 80.0,
    "b200": 180.0,
    "h200": 141.0,
    "h100-pcie": 80.0,
    "h100-nvl": 94.0,
    "a40": 48.0,
    "a30": 24.0,
    "l40s": 48.0,
    "l40": 48.0,
    "l4": 24.0,
    "rtx4090": 24.0,
    "rtx3090": 24.0,
}
# The first that is found in the driver's name of a device.
_NAMES = {
    r"\bH100 PCIe\b": "h100-pcie",
    r"\bH[12]00 NVL\b": "h100-nvl",
    r"\bG?H200\b": "h200",
    r"\bH100\b": "h100",
    r"\bA100\b": "a100",
    r"\bB200\b": "b200",
    r"\bA40\b": "a40",
    r"\bA30\b": "a30",
    r"\bL40S\b": "l40s",
    r"\bL40\b": "l40",
    r"\bL4\b": "l4",
    r"\bRTX 4090\b(?! Laptop| D)": "rtx4090",
    r"\bRTX 3090\b(?! Ti)": "rtx3090",
}


def peak_flops(device: str, precision: str) -> float | None:
    """FLOP/s that a device of this name (torch.cuda.get_device_name) reaches at most; None for one
    that is not known.

    precision: a run's ("fp32"; with "bf16" and "autocast" the products are in bf16). A part of a
    device (MIG) is not known.
    """
    if "MIG" in device:
        return None
    for pattern, name in _NAMES.items():
        if re.search(pattern, device):
            return PEAKS[name]["fp32" if precision == "fp32" else "bf16"] * 1e12
    return None
