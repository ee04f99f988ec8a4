"""Variants against each other at equal training tokens: plan, runs, choice of settings, report."""
