"""The HTTP API.

Endpoints are plain functions in the thread pool over one sync store; only event streams and upload parts are async.
"""
