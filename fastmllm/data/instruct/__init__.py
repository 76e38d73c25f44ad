"""Make instructions: from question, caption and box sets by templates, and from seeds by a language model."""
