"""Evaluation of models: predictions, metrics, results, tables, plots, reports."""
