"""Everything a run needs apart from the task."""
