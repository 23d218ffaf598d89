"""Settings of training that do not matter to its result. Imports nothing, for the workflow reads it too."""

# They change how work is done, never what comes out: a finished training, or checkpoints, are found again.
OPERATIONAL = frozenset({"workers", "checkpoint_every", "checkpoint_seconds", "checkpoints_kept", "trackers"})
