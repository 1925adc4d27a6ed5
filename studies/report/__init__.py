"""A speedrun study as one page and one picture: `write` makes report.html and report.png."""

from .page import write

__all__ = ["write"]
