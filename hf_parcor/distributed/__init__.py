"""All that knows of processes and shards: distributed tensors, processes that work together, FSDP2 and DDP."""
