"""Who answers."""

TEACHERS = {
    "local": "reflux.teachers.local:Local",
    "own": "reflux.teachers.own:Own",
}
