"""What a run tells: report.json for machines, report.md for people, manifest.json for both."""
