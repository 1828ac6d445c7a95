"""A small text for analyses."""

WINDOW = 24


TEXT = "The cat sat on the mat, and 12 naïve dogs watched it; then 7 left. "
