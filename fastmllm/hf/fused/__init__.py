"""What modules of transformers compute with: one file a subject, each class a `Fusion`."""
