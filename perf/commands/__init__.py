"""What one can run: `python -m perf NAME` calls `run` of the module NAME."""
