"""Runs on object storage: `--runs s3://bucket/folder`. Imports nothing heavy."""
