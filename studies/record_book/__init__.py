"""The record book of the speedrun tracks, records/: adding, checking and listing records."""
