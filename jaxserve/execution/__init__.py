"""From a step plan to device arrays, through the two compiled programs, and back. The one place that dispatches."""
