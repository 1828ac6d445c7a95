"""Losses that others have published, as points to fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mor.files import naming, read_toml
from mor.model.config import preset
from mor.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from mor.studies.results import model_facts
from mor.studies.scaling import Point

PAPER = Path(__file__).with_name("paper.toml")


class PublishedPoint(Settings):
    family: str
    preset: str
    num_recursions: PositiveInt
    budget: PositiveFloat
    tokens: PositiveFloat
    nll: NonNegativeFloat

    def point(self) -> Point:
        """Sizes are unique parameters without embeddings, in the paper's layout (middle_cycle)."""
        facts = model_facts(preset(self.preset, num_recursions=self.num_recursions, router="fixed"))
        return Point(
            family=self.family,
            size=facts["params"],
            budget=self.budget,
            tokens=self.tokens,
            nll=self.nll,
            once=facts["params"] - facts["looped_params"],
            looped=facts["looped_params"],
            loops=self.num_recursions,
        )


@dataclass(frozen=True, kw_only=True)
class Published:
    """A file of published losses. noise: standard deviation of one NLL, for the intervals."""

    title: str
    noise: float
    points: list[Point]


def load_published(path: Path) -> Published:
    """Raises ValueError for settings that it does not know or lacks."""
    values = read_toml(path)
    if "points" not in values:
        raise ValueError(f"{path} holds no points; a study is run without --fit")
    points = []
    for number, row in enumerate(values["points"], start=1):
        with naming(f"{path}: point {number}"):
            points.append(PublishedPoint.from_dict(row).point())
    return Published(
        title=values.get("title", path.stem), noise=float(values.get("noise", 0.0)), points=points
    )
