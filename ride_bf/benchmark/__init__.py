"""Measurements: `python -m ride_bf.benchmark NAME`."""
