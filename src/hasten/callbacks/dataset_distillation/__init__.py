"""What dataset distillation needs of a run: experts kept, a guard, an evaluation, an export."""
