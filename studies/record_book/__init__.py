"""The record book, records/."""
