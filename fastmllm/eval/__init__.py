"""Evaluation: closed-set, open-set and hallucination scores, each beside the controls that make it mean something."""

from fastmllm.eval.parsing import parse_choice, parse_count, parse_yes_no
from fastmllm.eval.vqa import normalise_answer, vqa_accuracy

__all__ = ["normalise_answer", "parse_choice", "parse_count", "parse_yes_no", "vqa_accuracy"]
