"""Evaluation: closed-set, open-set and hallucination scores, each beside the controls that make it mean something."""
