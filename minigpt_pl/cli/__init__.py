"""The commands and their options: fit, validate, test, predict, baselines, export, doctor."""
