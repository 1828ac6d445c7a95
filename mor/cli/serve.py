"""mor serve"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from mor.cli.command import Command
from mor.engine import EngineConfig
from mor.server.config import ServerConfig
from mor.settings import PositiveInt


class Serve(Command):
    """Serve a model over HTTP as OpenAI's clients expect it, with a page to watch it at /.

    SOURCE is a run, a checkpoint, a Llama directory, a .gguf file or a name on the Hugging Face
    hub. What is no mor model is converted in memory.
    """

    source: Positional[str]
    server: Annotated[ServerConfig, arg(name="")] = field(default_factory=ServerConfig)
    engine: Annotated[EngineConfig, arg(name="")] = field(default_factory=EngineConfig)
    chat_template: Path | None = None
    """A file with a chat template (Jinja), for a model that has none or in place of its own."""
    threads: PositiveInt | None = None
    """Of PyTorch on the CPU."""
    device: str = "auto"
    """auto, cpu, cuda or another PyTorch device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere."""

    def run(self, console: Console) -> None:
        from mor.files import extra

        with extra("serve", needed_for="mor serve"):
            from mor.server.run import run
            from mor.server.service import Service

        template = None if self.chat_template is None else self.chat_template.read_text()
        name = self.server.model_name or _name_of(self.source)
        if self.server.is_open:
            warnings.warn(
                f"everyone who reaches {self.server.host} may use this server; give it an "
                "--api-key",
                stacklevel=2,
            )
        logging.basicConfig(format="%(levelname)s: %(message)s")
        service = Service(self._maker(template), self.server, model_name=name)
        run(service, lambda url: print(f"{name}: {url}/v1 (page: {url}/)", flush=True))

    def _maker(self, template: str | None) -> Callable[[], Any]:
        """What loads the model, in the engine's thread."""

        def make() -> Any:
            import torch

            from mor.conversion.convert import read_source
            from mor.device import pick_device
            from mor.engine import Engine
            from mor.server.service import serve

            if self.threads:
                torch.set_num_threads(self.threads)
            place = pick_device(self.device)
            wide = "bfloat16" if place.type == "cuda" else "float32"
            dtype = getattr(torch, wide if self.dtype == "auto" else self.dtype)
            _, model, tokenizer = read_source(self.source)
            model = model.to(place, dtype)
            return serve(Engine(model, tokenizer, self.engine), template)

        return make


def _name_of(source: str) -> str:
    """What clients call it: no path, which is nobody's business."""
    path = Path(source)
    if path.exists():
        path = path.resolve()
        within = [folder for folder in path.parents if folder.name == "checkpoints"]
        return within[0].parent.name if within else path.stem if path.is_file() else path.name
    return source
