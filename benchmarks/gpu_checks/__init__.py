"""Parts of `benchmarks/check_gpu.py`: each module checks one thing on a device, and gives rows of its table."""
