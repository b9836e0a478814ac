"""The contracts: what a job is, what comes in, what goes out. No logic, no I/O."""
