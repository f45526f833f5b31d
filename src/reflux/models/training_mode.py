"""Switch a network to training without its random parts, so that the trained policy is the policy that
sampled the attempts.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def quiet_dropout(net: nn.Module) -> None:
    """Set every dropout probability to 0. Many architectures keep it as a plain number and apply it by a
    function; some leave out whole layers with a probability ("layerdrop").
    """
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute_activations(net: Any) -> None:
    """Switch on gradient checkpointing. It works only in modules in training mode, so exactly the modules
    that recompute are set to it. Other modules stay in evaluation mode, because some add noise in training,
    such as the routers of mixtures of experts.
    """
    net.gradient_checkpointing_enable()
    net.eval()
    for module in net.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
