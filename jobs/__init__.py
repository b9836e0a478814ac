"""What a person or a scheduler starts: one file a job, and the command line."""
