"""The paper's table of losses."""

import math

import pytest

from mor.studies.published import PAPER, load_published
from mor.studies.scaling import optima


def test_the_papers_table_is_whole_and_its_best_models_are_where_it_says():
    paper = load_published(PAPER)
    assert len(paper.points) == 36 and {p.family for p in paper.points} == {
        "vanilla",
        "recursive",
        "MoR",
    }
    assert {round(p.size / 1e6) for p in paper.points if p.family == "vanilla"} == {
        106,
        315,
        654,
        1611,
    }
    assert math.isclose(sum(p.nll for p in paper.points), 117.0614, abs_tol=1e-3)
    best = {(o.family, o.budget): o for o in optima(paper.points, noise=paper.noise, resamples=50)}
    # At the largest budget the paper prints its best vanilla and MoR losses at 730M.
    assert best["MoR", 1.65e19].size == pytest.approx(252e6, rel=0.3)
    assert all(o.inside for o in best.values())
