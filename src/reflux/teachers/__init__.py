"""Teachers: the parts that give targets for the student's attempts."""

TEACHERS = {
    "flow": "reflux.teachers.flow:Flow",
    "local": "reflux.teachers.local:Local",
    "self": "reflux.teachers.self_teacher:SelfTeacher",
    "vllm": "reflux.teachers.vllm:VLLM",
}
