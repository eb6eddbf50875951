"""Token ids in, token ids out: sampling, and the cached forward pass of one position."""
