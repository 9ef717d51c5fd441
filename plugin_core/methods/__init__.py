"""The published methods, one file each; PyTorch only."""
