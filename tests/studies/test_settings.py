"""Where the runs of a study may go."""

import pytest

from mor.studies.settings import Workers


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(jobs=0), "jobs must be"),
        (dict(gpus=-1), "gpus must be"),
        (dict(hours=0.0), "hours must be"),
        (dict(cluster="cloud"), "cluster must be"),
    ],
)
def test_places_that_there_cannot_be_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        Workers(**setting)
