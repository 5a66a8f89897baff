"""What a model is worth: predictions, metrics, results, tables, plots, reports."""
