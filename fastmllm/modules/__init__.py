"""Modules over the ops: each owns every parameter that its forward reads."""
