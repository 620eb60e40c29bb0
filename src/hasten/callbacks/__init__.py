"""What attaches to anyone's LightningModule and leaves it as it found it."""
