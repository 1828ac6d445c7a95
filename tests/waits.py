"""How often the host must wait for the device, counted on the CPU."""

from torch.overrides import TorchFunctionMode


class Waits(TorchFunctionMode):
    """Operations whose result the host must have before it goes on."""

    NAMES = frozenset(
        [
            "tolist",
            "item",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "nonzero",
            "bincount",
            "cpu",
        ]
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))
