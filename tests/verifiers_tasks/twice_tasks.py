import verifiers.v1 as vf

__all__ = ["Twice"]


class Twice(vf.Taskset[vf.Task[vf.TaskData]]):
    def load(self):
        return [vf.Task(vf.TaskData(id="a", prompt="?")) for _ in "12"]
