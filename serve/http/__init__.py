"""The HTTP front door: OpenAI's dialect, health and metrics; one file a concern."""
