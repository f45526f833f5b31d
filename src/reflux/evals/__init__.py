"""Numbers about the student of now."""

EVALS = {
    "accuracy": "reflux.evals.accuracy:Accuracy",
    "agreement": "reflux.evals.agreement:Agreement",
    "teacher_accuracy": "reflux.evals.teacher_accuracy:TeacherAccuracy",
}
