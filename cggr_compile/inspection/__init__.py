"""What people read of a plan: report, diff, page."""
