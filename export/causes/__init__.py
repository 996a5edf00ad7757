"""The known faults of a deployment, and the wrong tensors that each of them gives."""
