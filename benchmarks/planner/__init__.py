"""What the planner predicts, beside what was measured."""
