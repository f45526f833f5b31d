"""Clients of model servers: requests over HTTP, retries and limits. They know no part of a recipe."""
