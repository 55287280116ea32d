"""What compiled code says of speed: machine code, the loop model, predictions, candidates of sweeps."""
