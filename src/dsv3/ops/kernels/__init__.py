"""Triton kernels, one file an operation. Only the operations above import them, and only when they are about to launch one."""
