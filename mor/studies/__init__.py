"""Studies (``mor sweep``): grids of runs from one file, their table, comparisons and fits."""
