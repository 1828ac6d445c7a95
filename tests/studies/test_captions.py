"""Captions of the figures of studies."""

from mor.analysis.report import report_page, write_table
from mor.studies.captions import CAPTIONS


def test_captions_of_studies_are_given_by_who_knows_studies(tmp_path):
    write_table([{"row": "a"}], tmp_path / "tables" / "rows.csv")
    assert "<h2>Rows</h2>" in report_page(tmp_path)
    assert "<h2>Rows of the study</h2>" in report_page(tmp_path, entries=CAPTIONS)
