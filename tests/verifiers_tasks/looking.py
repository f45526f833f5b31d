import verifiers.v1 as vf

__all__ = ["Looking"]


class Data(vf.TaskData):
    answer: str


class Config(vf.ToolsetConfig):
    pass


class Numbers(vf.Toolset[Config]):
    TOOL_PREFIX = None

    @vf.tool
    def number_of(self, name: str) -> str:
        """The number of a name."""
        return {"a": "7", "b": "8"}[name]


class LookingTask(vf.Task[Data]):
    @classmethod
    def toolsets(cls, config):
        return [Numbers(Config())]

    @vf.reward
    async def right(self, task: Data, trace: vf.Trace) -> float:
        return float(trace.last_reply == task.answer)


class Looking(vf.Taskset[LookingTask]):
    def load(self):
        yield LookingTask(Data(prompt="What is a?", answer="7"))


if __name__ == "__main__":
    Numbers.run()
