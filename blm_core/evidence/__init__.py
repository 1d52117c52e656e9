"""What experiments and comparison need, and training and sampling do not."""
