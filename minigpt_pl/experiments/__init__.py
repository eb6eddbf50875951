"""Studies: variants over seeds, their results, statistics, report and plots."""
