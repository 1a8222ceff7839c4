"""Benchmarks of `benchmark.py` beside a step: loading, teachers, tracking, other load, memory."""
