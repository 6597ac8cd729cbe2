"""Programs that write files of the repository: workflows with their pictures, and what is derived from the schemas."""
