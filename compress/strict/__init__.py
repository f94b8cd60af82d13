"""JSON, YAML, pydantic models and plugin files that refuse what was not meant, with the file, the line and the key."""
