"""A model behind OpenAI's HTTP API, and the page that shows it"""
