"""What `benchmark.py` measures beside a step: loading, teachers, tracking, other load."""
