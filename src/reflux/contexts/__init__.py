"""What the teacher sees."""

CONTEXTS = {"same": "reflux.contexts.same:Same"}
