import itertools

import verifiers.v1 as vf

__all__ = ["Endless"]


class Endless(vf.Taskset[vf.Task[vf.TaskData]]):
    INFINITE = True

    def load(self):
        return (vf.Task(vf.TaskData(prompt=f"{k}?")) for k in itertools.count())
