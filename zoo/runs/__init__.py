"""What a run is made of: folder, data, batches, checkpoints, optimisers, processes."""
