"""LightningDataModules that share one loader, one split rule and one vocabulary."""
