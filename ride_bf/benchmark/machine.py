"""What a measurement was made on."""

import os
import platform

import torch


def describe_machine() -> str:
    """Cores or GPU, architecture and version of torch, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{device}, {platform.machine()}, torch {torch.__version__}"
