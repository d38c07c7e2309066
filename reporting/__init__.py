"""What report.py shows: the runs as they are on disk, their comparison, and the page."""
