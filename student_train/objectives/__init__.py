"""The terms of the loss, each with its kernels."""
