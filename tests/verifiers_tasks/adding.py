import verifiers.v1 as vf

__all__ = ["Adding"]


class Data(vf.TaskData):
    answer: str


class AddingTask(vf.Task[Data]):
    @vf.reward
    async def right(self, task: Data, trace: vf.Trace) -> float:
        return float(trace.last_reply == task.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return 1 / (1 + len(trace.last_reply))

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class Adding(vf.Taskset[AddingTask]):
    def load(self):
        for k in range(6):
            yield AddingTask(
                Data(
                    id=f"q{k}",
                    prompt=f"{k}+1?",
                    answer=str(k + 1),
                    system_prompt="Be brief." if k % 2 else None,
                )
            )
