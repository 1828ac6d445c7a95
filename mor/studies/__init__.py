"""Studies: grids of runs from one file, their table, comparisons and fits. ``mor sweep`` is the
command."""
