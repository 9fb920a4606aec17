"""The loop: plan, step, update, evaluate, checkpoint."""
