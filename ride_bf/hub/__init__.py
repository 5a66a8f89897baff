"""What is read of a run and published on the Hub: export, ONNX, card, upload."""
