"""What comes of it: answers, reports, inspections, and how they are shown."""
