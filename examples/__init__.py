"""What a user would write: examples that the pages, the tests and the benchmarks share."""
