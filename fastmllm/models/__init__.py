"""Vision encoders, language models, their composition, and checkpoints in and out."""
