"""JSON, YAML and pydantic models that refuse what was not meant, with the file, the line and the key."""
