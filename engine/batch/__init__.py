"""Several sequences in one pass over the weights, joining and leaving between tokens."""
