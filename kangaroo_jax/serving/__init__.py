"""A server of the model that speaks OpenAI's protocol, with the parts that vLLM added for videos."""
