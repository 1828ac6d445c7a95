"""Rows of a study against their reference, and the verdict on depth."""

import pytest

from mor.studies import compare
from mor.studies.study import (
    DepthPays,
    Study,
)
from tests.studies.small_study import study


def runs_of(**nll):
    return [
        dict(
            row=row.replace("_", " "),
            variant=row.replace("_", " "),
            budget=None,
            seed=seed,
            validation_nll=value,
        )
        for row, values in nll.items()
        for seed, value in enumerate(values)
    ]


def test_the_verdict_on_depth_follows_from_the_numbers(tmp_path):
    found = study(tmp_path)
    pays = compare.depth_verdict(
        found, runs_of(recursive=[1.0, 1.1, 1.2], one_pass=[1.4, 1.5, 1.61])
    )
    assert "depth pays" in pays and "+0.403" in pays
    noisy = compare.depth_verdict(
        found, runs_of(recursive=[1.0, 1.1, 1.2], one_pass=[1.0, 1.5, 1.3])
    )
    assert "says nothing about routing" in noisy
    assert "one seed" in compare.depth_verdict(found, runs_of(recursive=[1.0], one_pass=[2.0]))
    assert "not finished" in compare.depth_verdict(found, runs_of(recursive=[1.0]))


HAND = Study(
    title="",
    variants={"a": {}, "ab": {}, "b": {}},
    reference="a",
    depth_pays=DepthPays(deep="ab", shallow="b"),
)


def hand_runs():
    """By size and budget: a, ab worse by 0.5, 0.51 and 0.52, and b worse by 1 at size s and better
    by 1 at size l."""
    for size, extra in (("s", 1.0), ("l", -1.0)):
        for budget in (1e3, 1e6):
            for seed in range(3):
                base = 10 * (budget == 1e6) + 5 * (size == "l") + 0.1 * seed + 3
                for variant, nll in (
                    ("a", base),
                    ("ab", base + 0.5 + 0.01 * seed),
                    ("b", base + 0.5 + extra),
                ):
                    yield dict(
                        row=f"{variant}, size {size}",
                        variant=variant,
                        budget=budget,
                        seed=seed,
                        validation_nll=nll,
                        mean_depth=1 + seed,
                        params=1,
                        tokens=1,
                        train_flops=1,
                        train_s=1,
                        config_optim_lr=1,
                    )


def test_rows_are_compared_with_the_reference_at_the_same_place():
    lines = {line.row: line for line in compare.lines(HAND, hand_runs())}
    assert len(lines) == 12
    for place in (
        "size s, 1000 FLOPs",
        "size s, 1e+06 FLOPs",
        "size l, 1000 FLOPs",
        "size l, 1e+06 FLOPs",
    ):
        worse = lines[f"ab, {place}"]
        half = 4.302653 * 0.01 / 3**0.5  # Student's t for 2 degrees of freedom
        assert (
            worse.difference == pytest.approx(0.51) and worse.mean_depth == 2 and worse.seeds == 3
        )
        assert (worse.difference_low, worse.difference_high) == (
            pytest.approx(0.51 - half),
            pytest.approx(0.51 + half),
        )
        assert lines[f"b, {place}"].difference == pytest.approx(1.5 if "size s" in place else -0.5)
        assert lines[f"a, {place}"].difference is None and lines[
            f"a, {place}"
        ].nll_sd == pytest.approx(0.1)
    assert lines["a, size l, 1e+06 FLOPs"].nll == pytest.approx(18.1)


def test_depth_is_judged_at_every_place():
    verdicts = compare.depth_verdict(HAND, list(hand_runs())).splitlines()
    assert [verdict.split(": ")[0] for verdict in verdicts] == [
        f"ab, size {size}, {budget} FLOPs" for size in "sl" for budget in ("1000", "1e+06")
    ]
    assert all("depth pays: " in v and "+0.990" in v for v in verdicts[:2])
    assert all("does not clearly pay" in v and "-1.010" in v for v in verdicts[2:])
