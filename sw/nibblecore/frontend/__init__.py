"""From networks in other frameworks to the integer graph: PyTorch (with training) and ONNX."""
