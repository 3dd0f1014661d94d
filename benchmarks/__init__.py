"""Speed and memory, ours and others' side by side: ``python -m benchmarks``."""
