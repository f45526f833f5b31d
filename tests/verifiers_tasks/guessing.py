import verifiers.v1 as vf

__all__ = ["Guessing", "GuessingEnv"]


class Data(vf.TaskData):
    answer: str


class GuessingTask(vf.Task[Data]):
    @vf.reward
    async def right(self, task: Data, trace: vf.Trace) -> float:
        return float(task.answer in trace.last_reply)


class Guessing(vf.Taskset[GuessingTask]):
    def load(self):
        yield GuessingTask(Data(prompt="Guess a number.", answer="3"))


class GuessingConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class GuessingEnv(vf.Env[GuessingConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as player:
            said = await player.turn()
            while not said.terminated and task.data.answer not in said.last_reply:
                said = await player.turn("No. Again.")

    async def finalize(self, task, episode):
        for trace in episode.traces:
            trace.record_reward("turns", -0.1 * trace.num_turns)
