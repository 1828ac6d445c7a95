"""Captions of the tables and figures that :mod:`mor.studies.report` makes."""

from __future__ import annotations

from mor.analysis.report import Entry

CAPTIONS: dict[str, Entry] = {
    "rows": Entry(
        title="Rows of the study",
        note="Causal validation NLL of every seed. Differences from the reference row are taken "
        "seed by seed, with 95% intervals (Student's t): an interval that holds 0 is no "
        "significant difference. Of twenty rows that do not differ, about one shows a significant "
        "difference by chance.",
    ),
    "claims": Entry(
        title="What was claimed beforehand",
        note="Mean paired differences over seeds with 95% intervals (Student's t), whose upper end "
        "is to lie below the bound; or how far the mean depth spent lies from the one asked for, "
        "with the seeds furthest below and above.",
    ),
    "depths": Entry(
        title="Loss over inference depth",
        note="Causal validation NLL of trained models at mean depths of their tokens, on windows "
        "that no threshold was fitted to; means over seeds. Models whose routers learn nothing "
        "send all tokens to whole depths; between these lies the straight line. full: all tokens "
        "take the recursions that were trained. best: the measured depth with the lowest mean. A "
        "model without recursions stands at 1 with all its layers, however many these are.",
    ),
    "hops": Entry(
        title="Right answers and depth by hops",
        note="Means over seeds with the range of the seeds, threshold selection.",
    ),
    "exits": Entry(
        title="Exits chosen after training",
        note="Tokens of trained models leave early, at equal mean depth; the tokens before them "
        "are as deep as they are.",
    ),
    "isoflop": Entry(
        title="Loss over size at equal budgets",
        note="Parabolas in log size; stars: their lowest points.",
    ),
    "optima": Entry(title="Best sizes", note="From the parabolas, with 95% bootstrap intervals."),
    "optimal_paths": Entry(
        title="Best size and tokens over the budget", note="95% bootstrap intervals."
    ),
    "paths": Entry(
        title="Slopes of the optimal paths",
        note="Exponents of the budget, with 95% bootstrap intervals.",
    ),
    "recurrence_law": Entry(
        title="Recurrence law",
        note="NLL = floor + a (once + r^phi looped)^-alpha + b tokens^-beta; phi 1: a recursion is "
        "worth fresh layers.",
    ),
}
