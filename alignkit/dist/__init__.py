"""Processes and devices: the only importer of accelerate and torch.distributed."""
