"""A run on disk: settings and flags, its directory, checkpoints, resume, TensorBoard events, progress, seeds."""
