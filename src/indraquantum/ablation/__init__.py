"""Compares variants at equal training tokens: the plan, the runs, the search for settings, and the report."""
