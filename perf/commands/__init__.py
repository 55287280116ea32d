"""Subcommands: `python -m perf NAME` calls `run` of the module NAME."""
