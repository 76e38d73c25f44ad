"""Choose what to learn from: measure every sample of a source, decide by thresholds, write the kept ones anew.

The three are apart: thresholds change without measuring again, and the list of kept samples is a file of its own.
"""
