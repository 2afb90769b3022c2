"""What a run shows: tables, plots, the page, the comparison of two runs."""
