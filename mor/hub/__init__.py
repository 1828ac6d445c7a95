"""mor in transformers. Importing this package registers its classes with the Auto classes."""

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise ImportError(
        "mor.hub needs transformers 5 or newer; install it with: pip install "
        '"mixture-of-recursions[hf]" '
        f"({error})"
    ) from error

from mor.hub.configuration import MoRConfig
from mor.hub.modeling import MoRCache, MoRForCausalLM, MoROutput

AutoConfig.register("mor", MoRConfig)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM)

__all__ = ["MoRCache", "MoRConfig", "MoRForCausalLM", "MoROutput"]
