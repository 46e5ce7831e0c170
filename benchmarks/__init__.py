"""What the documentation says in numbers, measured: in the folder of a clone, ``python -m benchmarks.speed``."""
