"""Messages as token ids: chat templates, control tokens, the ends of turns, and the token maps of models."""
