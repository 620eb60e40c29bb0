"""The formulas: pure functions on tensors, torch alone, no state and no hidden randomness."""
