"""Triton kernels, one file a scheme. Imported at the first call on a GPU, never by `import qgraft`."""
