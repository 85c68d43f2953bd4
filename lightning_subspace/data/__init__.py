"""Examples of a probe: the batches that the loss is averaged over."""
