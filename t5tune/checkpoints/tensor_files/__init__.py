"""Read tensors from files, and write them."""
