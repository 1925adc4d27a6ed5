"""The exporter: a run as one script that needs torch alone."""
