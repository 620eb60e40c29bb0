"""What a run does in place of a fit: functions of its folder that return metrics by name."""
