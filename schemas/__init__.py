"""The contracts of alfa: jobs, prompts, tables, and documents of the lake. They do no I/O."""
