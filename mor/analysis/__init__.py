"""What routing does: records of a text (explain), statistics of a corpus (corpus), figures and
pages of both."""
