"""The modeling code of a small Baichuan, which tests put beside a checkpoint for PyTorch to execute."""
