"""C++ kernels for CPUs behind XLA's foreign function interface: float32, unstructured and block patterns, any geometry."""
