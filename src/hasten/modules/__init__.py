"""LightningModules, one training recipe each."""
