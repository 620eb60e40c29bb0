"""Modules over the formulas of hasten.functional; no Lightning."""
