"""Bridges to services outside: the only files that import mlflow or boto3."""
