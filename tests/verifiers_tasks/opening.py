"""The environment begins with another text than the task's."""

import verifiers.v1 as vf

__all__ = ["OpeningEnv"]


class OpeningEnv(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task, agents):
        await agents.agent.run(task.with_data(prompt="Another question."))
