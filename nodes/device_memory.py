"""How much of a device's memory a run may take, asked of the host that manages it."""

import comfy.model_management
import torch


def memory_for_a_run(device: torch.device) -> int:
    """Bytes that a run may take on `device` once the host has moved out everything else."""
    host = comfy.model_management
    loaded = sum(
        model.model_loaded_memory() for model in host.current_loaded_models if model.device == device and model.model
    )
    return max(0, int(host.get_free_memory(device) + loaded - host.extra_reserved_memory()))
