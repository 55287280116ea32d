"""How work is run and timed: devices, processes, journals, checks before timings."""
