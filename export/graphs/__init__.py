"""ONNX graphs from the one forward: the plan of an export, its symbols and its operators."""
