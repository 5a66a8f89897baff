"""Publishes a run on the Hub: export, ONNX, card, upload."""
