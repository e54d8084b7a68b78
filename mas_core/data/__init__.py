"""Buildings on disk -> verified, memory-mapped arrays -> clients -> batches on the device."""
