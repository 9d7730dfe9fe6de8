"""Training: one loop (loop), what it minimises (objectives), its optimizers, checkpoints and guards."""
