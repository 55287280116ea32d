"""What is run: shapes, models, the public calls, our kernels and their peers."""
