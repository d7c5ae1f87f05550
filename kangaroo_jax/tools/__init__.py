"""Programs around the library: quickstart, benchmarks, reports."""
