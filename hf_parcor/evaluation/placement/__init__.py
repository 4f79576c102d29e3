"""Where a model's weights lie: on which device, on the disk, in which process, and whether they can be reached."""
