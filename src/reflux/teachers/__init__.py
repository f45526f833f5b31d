"""Who answers."""

TEACHERS = {"local": "reflux.teachers.local:Local"}
