"""Evaluations: measurements of the current student. The protocol is in `base.py`."""

EVALS = {
    "accuracy": "reflux.evals.accuracy:Accuracy",
    "agreement": "reflux.evals.agreement:Agreement",
    "foresight": "reflux.evals.foresight:Foresight",
    "teacher_accuracy": "reflux.evals.teacher_accuracy:TeacherAccuracy",
    "test_accuracy": "reflux.evals.test_accuracy:ReportedAccuracy",
}
