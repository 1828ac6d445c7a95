"""mor in transformers. Importing this package registers its classes with the Auto classes."""

from mor.files import extra

with extra("hf", needed_for="mor.hub"):
    from transformers import AutoConfig, AutoModelForCausalLM

    from mor.hub.configuration import MoRConfig
    from mor.hub.modeling import MoRCache, MoRForCausalLM, MoROutput

AutoConfig.register("mor", MoRConfig)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM)

__all__ = ["MoRCache", "MoRConfig", "MoRForCausalLM", "MoROutput"]
