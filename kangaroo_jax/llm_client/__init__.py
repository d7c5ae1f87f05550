"""The client of language models: requests, cache, endpoints, teams of backends."""
