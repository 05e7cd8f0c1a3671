"""From text to token batches: tokenizer, sources, splits, masks, order and shapes. NumPy on the host, nothing random
that is not keyed, no mask that is guessed from a token id (laws 3 and 5)."""
