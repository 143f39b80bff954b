"""OpenAI's files and fine-tuning, as its own clients know them, on this service's uploads and jobs."""
