"""Process group of a probe, and the partition of vectors over it."""
