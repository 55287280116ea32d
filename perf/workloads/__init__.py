"""Workloads: shapes, models, public calls, our kernels and their peers."""
