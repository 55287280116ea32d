"""Analysis of compiled code: machine code, the loop model, predictions, candidates of sweeps."""
