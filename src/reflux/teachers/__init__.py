"""Who answers."""

TEACHERS = {
    "flow": "reflux.teachers.flow:Flow",
    "local": "reflux.teachers.local:Local",
    "own": "reflux.teachers.self_teacher:Own",
}
