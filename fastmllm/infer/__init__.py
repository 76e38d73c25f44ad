"""Generate from and score with a model: greedy, sampled, and over closed sets."""
