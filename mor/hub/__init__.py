"""mor in transformers. Importing this package registers its classes with the Auto classes."""

from typing import Any

from mor.files import extra

with extra("hf", needed_for="mor.hub"):
    from transformers import AutoConfig, AutoModelForCausalLM

    from mor import checkpoint
    from mor.hub.configuration import MoRConfig
    from mor.hub.modeling import MoRCache, MoRForCausalLM, MoROutput

AutoConfig.register("mor", MoRConfig)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM)
MoRForCausalLM.check_folder = checkpoint.check

__all__ = ["LoadBalancing", "MoRCache", "MoRConfig", "MoRForCausalLM", "MoROutput"]


def __getattr__(name: str) -> Any:
    if name == "LoadBalancing":  # brings transformers' Trainer along, which most do not need
        from mor.hub.trainer import LoadBalancing

        return LoadBalancing
    raise AttributeError(f"module 'mor.hub' has no attribute {name!r}")
