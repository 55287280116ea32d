"""What attention over dense and packed tensors shares: its backward pass, which MLA runs too, tiles and arguments."""
