"""A study's page and picture."""
