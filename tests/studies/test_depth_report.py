"""Lines and verdicts of a study's losses over inference depth."""

from types import SimpleNamespace

import pytest

from mor.studies.depth_report import Row, depth_lines, judge, verdicts
from mor.studies.study import Claim


def row(reference=None, *, off=0.0, **nll):
    """One seed after the other, by depth: d1 for 1, d1_5 for 1.5."""
    points = {
        seed: {
            depth: dict(nll=each, mean_depth=depth if depth == "full" else depth * (1 + off))
            | {"bits_per_byte": None}
            for depth, each in (
                ("full" if name == "full" else float(name[1:].replace("_", ".")), values[seed])
                for name, values in nll.items()
            )
        }
        for seed in range(2)
    }
    for seed in points.values():
        if "full" in seed:
            seed["full"]["mean_depth"] = 4.0
    return Row(points=points, reference=reference)


def test_lines_and_verdicts_follow_from_the_seeds():
    rows = {
        "a": row(d1=[0.9, 1.1], d2=[0.4, 0.5], d3=[0.6, 0.4], full=[0.7, 0.7], off=0.04),
        "b": row("a", d1=[0.8, 1.0], d2=[0.5, 0.6], full=[0.3, 0.4]),
    }
    asked = SimpleNamespace(depths=(1.0, 2.0, 3.0), claims=())
    lines = {(line.row, line.depth): line for line in depth_lines(asked, rows)}
    assert (lines["a", "best"].at, lines["b", "best"].at) == ("2", "full")
    assert lines["a", "best"].nll == pytest.approx(0.45)
    assert lines["b", "1"].difference == pytest.approx(-0.1)
    assert lines["b", "best"].difference == pytest.approx(-0.1), "each at its own best"
    assert lines["a", "2"].step == pytest.approx(-0.55) and lines["a", "1"].step is None
    assert lines["a", "2"].is_far_off and not lines["b", "2"].is_far_off
    assert not lines["a", "full"].is_far_off

    def verdict(**settings):
        claims = [Claim(name="x", row="a", **settings)]
        found = judge(SimpleNamespace(claims=claims), rows)
        return [line.verdict for line in found], verdicts(found)["x"]

    yes, no, unknown = "holds", "does not hold", "not known"
    against = dict(against=["b"], depths=[1.0, 2.0])
    assert verdict(below=0.0, **against) == (
        [no, yes],
        "does not hold (1 of 2; not: a at 1 against b)",
    )
    assert verdict(below=0.2, **against)[0] == [yes, yes]
    assert verdict(below=0.2, against=["b"], depths=[3.0]) == (
        [unknown],
        "not known yet (0 of 1 hold, the rest is open)",
    )
    assert verdict(below=0.0, depths=[1.0, 2.0, 3.0])[0] == [no, no], "wide intervals"
    assert verdict(below=9.0, depths=[1.0, 2.0, 3.0])[0] == [yes, yes]
    assert verdict(spent_within=0.03, depths=[1.0])[0] == [no]
    assert verdict(spent_within=0.05, depths=[1.0, 2.0])[0] == [yes, yes]


def test_the_better_of_several_rows_is_the_one_to_beat():
    rows = {"a": row(d1=[0.5, 0.6]), "b": row(d1=[0.8, 0.9]), "c": row(d1=[0.4, 0.5])}
    claims = [Claim(name="x", row="a", against=["b", "c"], depths=[1.0], below=0.0)]
    (line,) = judge(SimpleNamespace(claims=claims), rows)
    assert (
        line.against == "c" and line.value == pytest.approx(0.1) and line.verdict == "does not hold"
    )
    del rows["c"]
    (line,) = judge(SimpleNamespace(claims=claims), rows)
    assert line.against == "b or c" and line.verdict == "not known", "it might be the better one"
