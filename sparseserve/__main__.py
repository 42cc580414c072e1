"""`python -m sparseserve`."""

from sparseserve.cli import app

app()
